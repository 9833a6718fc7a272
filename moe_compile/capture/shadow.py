"""The shadow: a copy of a model in which every tensor is fake.

Probing and tracing work on the shadow, so they cost no memory, may change modes and configs as they
like, and cannot leave a hook or a flag behind on the user's model.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from moe_compile.adapters import transformers as hf
from moe_compile.capture.every_expert import HitShapeEnv
from moe_compile.capture.remembering_mode import RememberingMode
from moe_compile.capture.size_arithmetic import RememberingShapeEnv


@dataclass(frozen=True)
class Shadow:
    """A fake copy of a model, on the device where the model will train.

    Attributes:
        model: the copy; same structure and names, no storage.
        mode: the fake-tensor mode that owns its tensors.
        batch, sequence: the symbolic sizes of the probe's inputs. They may be any size from 0 up;
            their hints are no length of a tuple, so that nobody unpacks a tensor by mistake.
    """

    model: nn.Module
    mode: FakeTensorMode
    device: torch.device
    batch: torch.SymInt
    sequence: torch.SymInt

    def forget_pending_sizes(self) -> None:
        """Data-dependent sizes that were made outside of a trace, which would miss them."""
        assert self.mode.shape_env is not None
        self.mode.shape_env.pending_fresh_unbacked_symbols.clear()

    def unfixed_sizes(self) -> Any:
        """In it, code that asks for a size gets an example, and the size stays unknown.

        For calls of which no graph is kept: torch would take the answer for granted in every later
        trace.
        """
        assert self.mode.shape_env is not None
        return self.mode.shape_env.suppress_guards()


class Sizes(RememberingShapeEnv, HitShapeEnv):
    """The symbolic sizes of a shadow."""


def cast_shadow(model: nn.Module, device: torch.device | None = None) -> Shadow:
    """Copies `model` with fake tensors in the place of its own; `model` is not touched.

    `device` is where it will train, if that is not where it is.
    """
    env = Sizes()
    mode = RememberingMode(shape_env=env, allow_non_fake_inputs=True)
    device = training_device(model) if device is None else device
    memo: dict[int, Any] = {id(t): _fake(t, mode, device) for t in _tensors(model)}
    shadow = copy.deepcopy(model, memo)
    hf.make_traceable(shadow)
    return Shadow(shadow, mode, device, _size(env, "batch", 7), _size(env, "sequence", 8))


def training_device(model: nn.Module) -> torch.device:
    """The device of the model's parameters; for a meta model the accelerator, else the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor that a module holds, also those that are plain attributes."""
    held = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        held += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return held


def _fake(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


def _size(env: ShapeEnv, name: str, hint: int) -> torch.SymInt:
    source = ConstantSource(name)
    symbol = env.create_symbol(
        hint,
        source,
        dynamic_dim=DimDynamic.DYNAMIC,
        constraint_dim=None,
    )
    size = env.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    return size
