"""What becomes of all that is no expert."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.install.deferred_logits import DeferredLogits
from moe_compile.parallel.fsdp import joined_in_a_row
from tests.parallel.models import (
    EXPERTS_ONLY,
    both,
    call_of,
    check_gradients,
    check_step,
    small,
    with_forward,
)
from tests.ranks import on_ranks


def options() -> None:
    """One `fully_shard` a layer and one for the model, with the options that were given."""
    config = OptimizeConfig(fsdp={"reshard_after_forward": False})
    model, reference = both("ep", small(num_hidden_layers=2), config)
    wrapped = [m for m in model.modules() if isinstance(m, FSDPModule)]
    assert wrapped == [model, *model.model.layers]
    for layer in model.model.layers:
        assert layer._get_fsdp_state()._fsdp_param_group.post_forward_mesh_info is None
    check_step(model, reference)


def joined() -> None:
    """The first two layers, which are of two kinds, are a unit of FSDP2; the third is by itself."""
    layers = small("gpt_oss", num_hidden_layers=3)
    model, reference = both("ep", layers, OptimizeConfig(layers_per_unit=2))
    states = [layer._get_fsdp_state() for layer in model.model.layers]
    assert states[0] is states[1] is not states[2]
    check_step(model, reference)
    assert all(isinstance(layer, FSDPModule) for layer in model.model.layers)


def heads() -> None:
    """No hook of FSDP2 reads the logits; a loss outside of the model has its gradients averaged.

    Also where the head alone is trained, of which only the logits' hook tells FSDP2; and of a head
    whose weight other code reads.
    """
    model, reference = both("ep", small(num_hidden_layers=2), OptimizeConfig(compile=False))
    logits = model(**call_of(dist.get_rank())).logits
    assert isinstance(logits, DeferredLogits)
    assert logits.computed is None
    check_gradients(model, reference, of_logits)
    check_gradients(model, reference, of_the_weight)
    check_gradients(model, reference, of_two_calls)
    check_gradients(model, reference, of_a_detached_call)
    for each in (model, reference):
        each.requires_grad_(False).lm_head.requires_grad_(True)
    check_gradients(model, reference, of_logits)


def resharded() -> None:
    """Where FSDP2 shards the head again after a forward, its logits are there no more."""
    config = OptimizeConfig(compile=False, fsdp={"reshard_after_forward": True})
    model, _ = both("ep", small(), config)
    with pytest.raises(RuntimeError, match="sharded again"):
        model(**call_of(dist.get_rank())).logits.sum()


def of_logits(model: Any, rank: int) -> torch.Tensor:
    """A loss that is no cross-entropy."""
    return model(**call_of(rank)).logits.float().log_softmax(-1)[..., 3].mean()


def of_the_weight(model: Any, rank: int) -> torch.Tensor:
    """Of a forward that does not call the head, as Liger's and TRL's fused losses put in."""

    def forward(self: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return F.linear(hidden, self.lm_head.weight).log_softmax(-1)[..., 3].mean()

    return with_forward(model, forward, rank)


def of_two_calls(model: Any, rank: int) -> torch.Tensor:
    """Two forwards before their backward."""
    return of_logits(model, rank) + of_logits(model, rank + 1)


def of_a_detached_call(model: Any, rank: int) -> torch.Tensor:
    """The head is called twice in a forward, first where the rest of the model is not trained."""

    def forward(self: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        labels = input_ids.flatten()
        logits = (self.lm_head(h).flatten(0, 1) for h in (hidden.detach(), hidden))
        return sum(F.cross_entropy(each, labels) for each in logits)  # type: ignore[return-value]

    return with_forward(model, forward, rank)


def alone() -> None:
    """Without FSDP2 only the experts are shards, and gradients of the rest are a rank's own."""
    model, reference = both("ep", small(), OptimizeConfig(fsdp=False))
    assert not any(isinstance(m, FSDPModule) for m in model.modules())
    for name, parameter in model.named_parameters():
        assert hasattr(parameter, "device_mesh") == (".experts." in name)
    check_averaged_step(model, reference)


def check_averaged_step(model: Any, reference: Any) -> None:
    def average(gradient: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(gradient)
        return gradient / dist.get_world_size()

    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            parameter.register_hook(average)
    check_step(model, reference)


def on_two_ranks() -> None:
    options()
    joined()
    heads()
    resharded()
    alone()


def test_options_and_none() -> None:
    on_ranks(2, on_two_ranks)


def test_layers_of_one_list_are_joined() -> None:
    layers: list[nn.Module] = [nn.Linear(1, 1) for _ in range(7)]
    names = ("encoder", "encoder", "encoder", "decoder", "decoder", "decoder", "decoder")
    groups = [[layer] for layer in layers[:5]] + [layers[5:]]
    lists = dict(zip(layers, names, strict=True))
    for count, want in ((1, (1, 1, 1, 1, 1, 2)), (2, (2, 1, 2, 2)), (4, (3, 4))):
        units = joined_in_a_row(groups, lists, count)
        assert [layer for unit in units for layer in unit] == layers
        assert tuple(map(len, units)) == want


def from_cpu_to_gpu(shape: tuple[int, ...]) -> None:
    torch.cuda.set_device(0)
    mesh = init_device_mesh("cuda", shape, mesh_dim_names=("ep",))
    for fsdp in ("auto", False):
        config = OptimizeConfig(fsdp=fsdp, compile=False)
        model: Any = moe_compile.optimize(small(), mesh, config, passes=EXPERTS_ONLY)
        held = (*model.parameters(), *model.buffers())
        assert {tensor.device.type for tensor in held} == {"cuda"}, fsdp
        if fsdp is False:  # gloo cannot do what FSDP2 needs
            ids = torch.ones(1, 8, dtype=torch.int64, device="cuda")
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_on_the_cpu_moves_to_the_mesh(ranks: int) -> None:
    on_ranks(ranks, from_cpu_to_gpu, (ranks,))
