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
    """A model of one layer, which is the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, hidden_states: Tensor) -> Any:
        """What the block returns."""
        return self.layers[0](hidden_states)


def load(spec: BlockSpec) -> Model:
    """The block with random parameters, the same at every call."""
    name, text = f"<moe block {spec.seed}>", source(spec)
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module = types.ModuleType(f"moe_block_{spec.seed}")
    module.__file__ = name
    sys.modules[module.__name__] = module  # where `inspect` looks for a class
    exec(compile(text, name, "exec"), vars(module))
    model = Model(module.MoEBlock())
    _fill(model, torch.Generator().manual_seed(spec.seed))
    return model


def _fill(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0.0, 0.5, generator=generator)
        for tensor in model.buffers():
            tensor.normal_(0.0, 0.05, generator=generator)
