"""Turns a block's source into modules that tracebacks and `inspect` can read."""

import linecache
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

from moe_compile.fuzz.source import source
from moe_compile.fuzz.spec import BlockSpec


class Model(nn.Module):
    """A model of two such blocks, of which one is captured and both are rewritten.

    They are side by side: behind another, rounding could tip a choice of experts.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, hidden_states: Tensor) -> Any:
        """What the blocks return."""
        return [layer(hidden_states) for layer in self.layers]


def load(spec: BlockSpec) -> Model:
    """Two blocks with random parameters, the same at every call."""
    name, text = f"<moe block {spec.seed}>", source(spec)
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module = types.ModuleType(f"moe_block_{spec.seed}")
    module.__file__ = name
    sys.modules[module.__name__] = module  # where `inspect` looks for a class
    exec(compile(text, name, "exec"), vars(module))
    model = Model(module.MoEBlock(), module.MoEBlock())
    _fill(model, torch.Generator().manual_seed(spec.seed))
    return model


def _fill(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0.0, 0.5, generator=generator)
        for tensor in model.buffers():
            tensor.normal_(0.0, 0.05, generator=generator)
