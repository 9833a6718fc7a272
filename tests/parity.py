"""The error of an optimized model and of its original against the original in float64.

All three get the original's routing: where two experts are nearly equal, rounding chooses between
them, and the models would not compute the same function. The float64 run is on the CPU.
"""

import contextlib
import copy
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

import moe_compile
from tests.pairs import Pair, error, step

Routing = dict[str, tuple[Tensor, Tensor]]
Errors = dict[str, tuple[float, float]]
"""The relative L2 error of every output and gradient: the optimized model's, the original's."""


def errors(models: Pair, call: dict[str, Any], *, autocast: bool = False) -> Errors:
    """Runs the three models on one call and compares loss, logits and every gradient."""
    device = next(models.original.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        routing = recorded_routing(models.original, experts_of(models), call)
        own, new = (
            replayed(model, routing, lambda model=model: step(model, **call))
            for model in (models.original, models.optimized)
        )
    wide = copy.deepcopy(models.original).cpu().double()
    wide.set_experts_implementation("eager")  # grouped_mm takes no float64
    on_cpu = {name: (ids.cpu(), weights.cpu()) for name, (ids, weights) in routing.items()}
    moved = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in call.items()}
    exact = replayed(wide, on_cpu, lambda: step(wide, **moved))
    assert new.keys() == own.keys() == exact.keys()
    return {n: (error(new[n], exact[n]), error(own[n], exact[n])) for n in own}


def too_large(found: Errors, floor: float) -> Errors:
    """The errors that are more than twice the original's own, and than the floor."""
    return {n: (new, own) for n, (new, own) in found.items() if not new <= max(2 * own, floor)}


def pooled(draws: list[Errors]) -> Errors:
    """The root mean square of every error: a small tensor's single error is a matter of luck."""

    def rms(values: list[float]) -> float:
        return (sum(value**2 for value in values) / len(values)) ** 0.5

    return {
        name: (rms([draw[name][0] for draw in draws]), rms([draw[name][1] for draw in draws]))
        for name in draws[0]
    }


def experts_of(models: Pair) -> list[str]:
    """The names of every experts module: as many as the report's sites have layers."""
    sites = [s for s in moe_compile.report(models.optimized).sites if s.kind == "experts"]
    classes = {type(models.original.get_submodule(site.module)) for site in sites}
    names = [n for n, m in models.original.named_modules() if type(m) in classes]
    assert len(names) == sum(site.layers for site in sites) > 0
    return names


def recorded_routing(model: nn.Module, names: list[str], call: dict[str, Any]) -> Routing:
    """Expert ids and weights, as the experts modules of one forward got them."""
    found: Routing = {}

    def recorder(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            found[name] = args[1].clone(), args[2].detach().clone()

        return record

    with _hooks(model, names, recorder), torch.no_grad():
        model(**call)
    assert len(found) == len(names)
    return found


def replayed(model: nn.Module, routing: Routing, run: Callable[[], Any]) -> Any:
    """`run()` while the experts of `model` get the recorded ids and weights."""

    def replay(_: str) -> Any:
        def force(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> Any:
            ids, weights = module.forced_routing
            return args[0], ids, weights.to(args[2].dtype)

        return force

    for name, forced in routing.items():
        vars(model.get_submodule(name))["forced_routing"] = forced
    with _hooks(model, list(routing), replay):
        return run()


@contextlib.contextmanager
def _hooks(model: nn.Module, names: list[str], make: Callable[[str], Any]) -> Generator[None]:
    with contextlib.ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(make(name))
            stack.callback(handle.remove)
        yield
