"""Loss and gradients of an optimized model and of the original, against the original in float64.

All three get the original's routing: where two experts are nearly equal, rounding chooses between
them, and the models would not compute the same function. The float64 run is on the CPU.
"""

import contextlib
import copy
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import moe_compile

FLOORS = {torch.float32: 1e-5, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}
Routing = dict[str, tuple[Tensor, Tensor]]
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Differences:
    """Relative L2 errors, the new model's and the original's: the loss, and the worst gradient.

    `wrong` names what has more than twice the original's error, and more than `FLOORS` allows.
    """

    loss: tuple[float, float]
    gradient: tuple[float, float]
    wrong: list[str]

    def cells(self) -> tuple[str, str]:
        """Both errors as `new (original)`."""
        loss, gradient = (f"{new:.1e} ({own:.1e})" for new, own in (self.loss, self.gradient))
        return loss, gradient + (f" OFF: {self.wrong[0]}" if self.wrong else "")


def differences(original: Any, optimized: Any, ids: Tensor) -> Differences:
    """Runs the three models on the same rows and compares them."""
    names = experts_of(original, moe_compile.report(optimized))
    routing = recorded_routing(original, names, ids)
    own, new = (replayed(model, routing, ids) for model in (original, optimized))
    on_cpu = {name: (picks.cpu(), weights.cpu()) for name, (picks, weights) in routing.items()}
    wide = copy.deepcopy(original).cpu().double()
    wide.set_experts_implementation("eager")  # grouped_mm takes no float64
    exact = replayed(wide, on_cpu, ids.cpu())
    errors = {n: (error(new[n], exact[n]), error(own[n], exact[n])) for n in own}
    floor = FLOORS[next(original.parameters()).dtype]
    wrong = [n for n, (mine, theirs) in errors.items() if not mine <= max(2 * theirs, floor)]
    loss = errors.pop("loss")
    return Differences(loss, max(errors.values()), wrong)


def experts_of(model: nn.Module, report: moe_compile.Report) -> list[str]:
    """The names of every experts module, by the class of those in the report."""
    sites = [site.module for site in report.sites if site.kind == "experts"]
    classes = {type(model.get_submodule(name)) for name in sites}
    return [name for name, module in model.named_modules() if type(module) in classes]


def recorded_routing(model: Any, names: list[str], ids: Tensor) -> Routing:
    """Expert ids and weights, as the experts modules of one forward get them."""
    found: Routing = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            found[name] = args[1].clone(), args[2].detach().clone()

        return record

    with _hooks(model, names, recorder), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return found


def replayed(model: Any, routing: Routing, ids: Tensor) -> Values:
    """The loss and every gradient, with the routing given."""

    def forcer(name: str) -> Callable[..., Any]:
        model.get_submodule(name).forced_routing = routing[name]

        def force(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> Any:
            picks, weights = module.forced_routing
            return args[0], picks, weights.to(args[2].dtype)

        return force

    model.zero_grad(set_to_none=True)
    with _hooks(model, list(routing), forcer):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    gradients = {n: p.grad.detach() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients


def error(value: Tensor, reference: Tensor) -> float:
    """The relative L2 error."""
    reference = reference.double().cpu()
    difference = (value.double().cpu() - reference).norm().item()
    norm = reference.norm().item()
    return difference / norm if norm > 0 else difference


@contextlib.contextmanager
def _hooks(model: nn.Module, names: list[str], make: Callable[[str], Any]) -> Generator[None]:
    with contextlib.ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(make(name))
            stack.callback(handle.remove)
        yield
