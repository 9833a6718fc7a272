"""How evenly the routers spread tokens over experts, and a callback that evens it out.

balance = moe_compile.RouterBalance(model)
...
optimizer.step()
balance.step()
tracker.log(balance.metrics())
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from moe_compile.install.count_picks import COUNTS, Router
from moe_compile.kernels.all_to_all import process_group

ROUTERS = "_moe_compile_routers"
"""The attribute of an optimized model that holds its `Routers`."""


@dataclass(frozen=True)
class Routers:
    """What can be counted in a model, and the name of the group of its ranks; None for all."""

    found: tuple[Router, ...]
    group: str | None = None


class RouterLoad:
    """Counts the tokens that each expert gets: in training, over all ranks, from step to step.

    Calls of one step are added up, as gradients are; what a backward computes again does not count,
    and neither does evaluation. A token that is only padding counts, as it is routed. Nothing waits
    for the device before `metrics`.

    Args:
        model: what `optimize` returned, on the device where it trains.

    Raises:
        ValueError: for a model that was not optimized, whose experts are counted already, or none
            of whose experts were rewritten.
    """

    def __init__(self, model: nn.Module) -> None:
        self._root, known = _optimized(model, type(self).__name__)
        self.routers, self._group = known.found, known.group
        self._counts: list[Tensor] = []
        self._last: list[Tensor] = []
        if not self.routers:
            raise ValueError(
                f"{type(self).__name__} got a {type(model).__name__} without experts that optimize "
                "rewrote; it takes one with some; print(moe_compile.report(model)) says why"
            )
        self._check()
        for router in self.routers:
            owner = self._root.get_submodule(router.module)
            device = next(owner.parameters()).device
            counts = torch.zeros(router.experts + 1, dtype=torch.int64, device=device)
            self._counts.append(counts)
            vars(owner)[COUNTS] = [*vars(owner).get(COUNTS, []), counts]

    def _check(self) -> None:
        if any(hasattr(self._root.get_submodule(r.module), COUNTS) for r in self.routers):
            raise ValueError(
                f"{type(self).__name__} got a model whose picks are counted already; it takes one "
                "that nobody counts; use the RouterLoad or RouterBalance that there is"
            )

    def step(self) -> None:
        """Ends a step: call it after the optimizer's, on every rank."""
        every = torch.cat(self._counts)
        if dist.is_initialized():
            dist.all_reduce(
                every, group=None if self._group is None else process_group(self._group)
            )
        for counts in self._counts:
            counts.zero_()
        # The first of each counts picks that went nowhere.
        self._last = [part[1:] for part in every.split([len(c) for c in self._counts])]

    def metrics(self) -> dict[str, float]:
        """The last step in numbers, for any tracker; empty before the first. Waits for the device.

        Of every block of experts `router/<module>/tokens/<expert>`; `.../imbalance`, what the
        busiest expert got over the mean, 1.0 if all got the same; `.../dead_experts`, how many got
        nothing. And `router/imbalance`, the largest, and `router/dead_experts`, the sum.
        """
        found: dict[str, float] = {}
        for router, load in zip(self.routers, self._last, strict=False):
            name = f"router/{router.module}" + (f".{router.index}" if router.index else "")
            tokens: list[int] = load.tolist()
            mean = sum(tokens) / len(tokens)
            found |= {f"{name}/tokens/{expert}": float(n) for expert, n in enumerate(tokens)}
            found[f"{name}/imbalance"] = max(tokens) / mean if mean else 1.0
            found[f"{name}/dead_experts"] = float(tokens.count(0))
        if found:
            ends = "/imbalance", "/dead_experts"
            largest, dead = ([v for n, v in found.items() if n.endswith(end)] for end in ends)
            found |= {"router/imbalance": max(largest), "router/dead_experts": sum(dead)}
        return found

    def callback(self) -> Any:
        """A `TrainerCallback` of transformers' that ends a step with each step of the optimizer."""
        from moe_compile.adapters.stepping import Stepping

        return Stepping(self.step)


class RouterBalance(RouterLoad):
    """Evens out what the experts get by the routers' correction biases, without a loss.

    After each step, bias += rate * sign(mean load - load), from the tokens of all ranks. The bias
    is what the router adds to its scores for the choice of experts alone, found in its graph.

    Args:
        model: what `optimize` returned, on the device where it trains.
        rate: how far a bias moves in a step; the scores are often probabilities.

    Raises:
        ValueError: as `RouterLoad`; for a rate that is not positive; where no router has such a
            bias, or one in less than float32, in which a step is lost.

    Source: auxiliary-loss-free load balancing (arXiv:2408.15664), with DeepSeek-V3's rate.
    """

    def __init__(self, model: nn.Module, *, rate: float = 1e-3) -> None:
        self.rate = rate
        super().__init__(model)

    def _check(self) -> None:
        super()._check()
        if not self.rate > 0:
            raise ValueError(
                f"RouterBalance got a rate of {self.rate}; it takes a positive number; leave it "
                "out for 0.001"
            )
        names = [router.bias for router in self.routers if router.bias is not None]
        if not names:
            raise ValueError(
                "RouterBalance got a model whose routers have no correction bias; it takes those "
                "that add one to the scores for the choice alone, as DeepSeek-V3's do; use "
                "RouterLoad for the metrics, and the model's auxiliary loss for the balance"
            )
        for name in names:
            dtype = self._bias(name).dtype
            if dtype.itemsize < 4:
                raise ValueError(
                    f"RouterBalance got {name} in {dtype}; it takes float32, in which small steps "
                    "add up; convert it before optimize"
                )

    def _bias(self, name: str) -> Tensor:
        module, _, attribute = name.rpartition(".")
        found: Tensor = getattr(self._root.get_submodule(module), attribute)
        return found

    @torch.no_grad()
    def step(self) -> None:
        """Ends a step, and moves the biases: call it after the optimizer's, on every rank."""
        super().step()
        for router, load in zip(self.routers, self._last, strict=True):
            if router.bias is not None:
                tokens = load.to(torch.float32)
                add_everywhere(
                    self._bias(router.bias), self.rate * torch.sign(tokens.mean() - tokens)
                )


def add_everywhere(bias: Tensor, change: Tensor) -> None:
    """Adds in place what every rank has, also to a bias that is a shard."""
    if isinstance(bias, DTensor):
        own = [Replicate()] * bias.device_mesh.ndim
        whole = DTensor.from_local(change.view(bias.shape), bias.device_mesh, own, run_check=False)
        bias += whole.redistribute(placements=bias.placements).to(bias.dtype)
    else:
        bias += change.view(bias.shape).to(bias)


def _optimized(model: nn.Module, name: str) -> tuple[nn.Module, Routers]:
    """The module that was optimized, which a wrapper may hold, and its routers."""
    for module in model.modules():
        known = vars(module).get(ROUTERS)
        if isinstance(known, Routers):
            return module, known
    raise ValueError(
        f"{name} got a {type(model).__name__} that was not optimized; it takes the model that "
        "optimize returned; call optimize first"
    )
