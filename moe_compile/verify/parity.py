"""Checks an installed function against the module that it replaces, on small real tensors.

Programs on the same inputs and parameters: the module's own forward, the captured graph, the
captured graph in float64, and the new function. The capture must compute what the module does;
the error of every output and gradient of the new function against float64 may be at most twice
the module's own, or 4 eps, or what a pass allows that is not exact; where it is more, eight draws
decide. `verify="full"` also proves the
raised graph over a prime field.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from moe_compile.capture.any_dtype import AnyDtypeGroupedMM
from moe_compile.capture.boundary import enter
from moe_compile.capture.trace import autocast
from moe_compile.capture.untouched import Untouched, UntouchedStore
from moe_compile.install.cut import cut
from moe_compile.install.forward import Variant, on_one_rank
from moe_compile.rewrite.choices import example_ids
from moe_compile.rewrite.dispatch_mask import example_mask
from moe_compile.rewrite.normal_form import is_random
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.unit_graph import UnitGraph
from moe_compile.verify import meanings as _register_meanings  # noqa: F401  # pyright: ignore
from moe_compile.verify.example_sizes import example_sizes
from moe_compile.verify.in_float64 import InFloat64
from moe_compile.verify.oracle import Disproved, prove

Program = Callable[..., Any]
Values = dict[str, Tensor]

_LIMIT_BYTES = 256 * 2**20
_DRAWS = 8

_ROUNDING = 1024 * torch.finfo(torch.float64).eps
"""Beside the largest, what float64 may leave of terms that cancel."""


@dataclasses.dataclass(frozen=True)
class _Errors:
    """L2 errors by value, see `_scales`: the capture against the module, the rewrite and the module
    against float64; the rounding that they are judged by, and the error that passes allow which are
    not exact.
    """

    eps: float
    capture: dict[str, float]
    rewrite: dict[str, float]
    own: dict[str, float]
    tolerance: float = 0.0

    def problem(self) -> str | None:
        """The first error that is too large."""
        found = _first_above("the capture", self.capture, {}, 16 * self.eps)
        floor = max(4 * self.eps, self.tolerance)
        return found or _first_above("the rewrite", self.rewrite, self.own, floor)

    def largest(self) -> float | None:
        """Of a rewrite that is not exact, its largest error."""
        return max(self.rewrite.values(), default=None) if self.tolerance else None


def _pooled(draws: list[_Errors]) -> _Errors:
    """The root mean square of every error."""

    def pool(parts: list[dict[str, float]]) -> dict[str, float]:
        return {n: (sum(p[n] ** 2 for p in parts) / len(parts)) ** 0.5 for n in parts[0]}

    return _Errors(
        draws[0].eps,
        pool([draw.capture for draw in draws]),
        pool([draw.rewrite for draw in draws]),
        pool([draw.own for draw in draws]),
        draws[0].tolerance,
    )


def _first_above(
    what: str, errors: dict[str, float], allowed: dict[str, float], floor: float
) -> str | None:
    for name, error in errors.items():
        limit = max(2 * allowed.get(name, 0.0), floor)
        if not error <= limit:  # also NaN
            return f"{what} has an error of {error:.1e} in {name}, the limit is {limit:.1e}"
    return None


def _tolerance(graph: UnitGraph, call: int) -> float:
    """What the passes that are not exact allow of what they changed in a call."""
    own = (node.meta for node in graph.graph.nodes if node.meta.get("calls", ())[-1:] == (call,))
    return max((meta.get("tolerance", 0.0) for meta in own), default=0.0)


class OwnCodeFails(Refuse):
    """The module's own code cannot run in a call form that was foreseen for it."""


@contextlib.contextmanager
def _in_any_order() -> Generator[None]:
    """Lets a module's own code run that torch's deterministic setting would stop."""
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)


class Verifier:
    """Verifies the variants of one unit on a copy of it; `level` is `OptimizeConfig.verify`."""

    def __init__(self, unit: nn.Module, level: str, device: torch.device) -> None:
        self.level = level
        self.enabled = _is_verifiable(unit, level)
        self.unit = copy.deepcopy(unit).to(device) if self.enabled else unit

    def check(
        self, graph: UnitGraph, call: int, variant: Variant, program: Program
    ) -> float | None:
        """Refuses a variant whose program does not compute what the module computes.

        Returns:
            the largest error, where a pass is not exact: see `Pass.tolerance`.
        """
        inside = (n for n in graph.captured.nodes if call in n.meta.get("calls", ()))
        if not self.enabled or any(map(is_random, inside)):
            return None
        self.unit.train(graph.mode.training is not False)

        def measure(seed: int) -> _Errors:
            with _in_any_order():
                return self._measure(graph, call, variant, program, seed)

        found = measure(0)
        if found.problem() is not None:
            # The error of a small tensor is a matter of luck; that of several draws is not.
            found = _pooled([measure(seed) for seed in range(_DRAWS)])
        problem = found.problem()
        if problem is not None:
            raise Refuse(f"verification failed: {problem}")
        if self.level in ("raise", "full"):
            self._prove(graph, call, variant)
        return found.largest()

    def _measure(
        self, graph: UnitGraph, call: int, variant: Variant, program: Program, seed: int
    ) -> "_Errors":
        """The errors of the capture, the rewrite and the module itself on one draw of inputs."""
        owner = self.unit.get_submodule(graph.path(call))
        call_args, tensors = self._inputs(graph, owner, variant, seed)
        captured = _program(graph, graph.captured, call)
        with autocast(graph.mode, tensors[0].device):
            new, used = _run_rewrite(program, owner, tensors)
            own, _ = run(_own_forward(call_args), owner, tensors, used)
            same, _ = run(captured, owner, tensors, used)
            eps = _epsilon(owner, tensors)
        if self.level == "raise":
            return _Errors(eps, _errors(same, own, _scales(own)), {}, {})
        wide = _in_float64(captured, owner, tensors, used)
        scales = _scales(wide)
        capture, rewrite, rounding = (
            _errors(*each, scales) for each in ((same, own), (new, wide), (own, wide))
        )
        return _Errors(eps, capture, rewrite, rounding, _tolerance(graph, call))

    def _prove(self, graph: UnitGraph, call: int, variant: Variant) -> None:
        assert graph.raised is not None
        owner = self.unit.get_submodule(graph.path(call))
        _, tensors = self._inputs(graph, owner, variant, 0)
        captured, raised = (
            _program(graph, stage, call) for stage in (graph.captured, graph.raised)
        )
        with autocast(graph.mode, tensors[0].device):
            _, used = run(raised, owner, tensors)  # a rewrite may drop what nobody uses
        _prove_over_field(captured, raised, owner, tensors, used)

    def _inputs(
        self, graph: UnitGraph, owner: nn.Module, variant: Variant, seed: int
    ) -> tuple[Any, list[Tensor]]:
        """The owner's arguments, and the tensors among them, in a run of what was captured."""
        seen: list[Any] = []

        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = variant.inputs(module, args, kwargs)
            if tensors is not None:
                seen.append(((args, kwargs), [t.detach() for t in tensors]))

        handle = owner.register_forward_pre_hook(record, with_kwargs=True)
        args, kwargs = _example_call(graph, next(self.unit.parameters()).device, seed)
        try:
            with torch.no_grad(), autocast(graph.mode, next(self.unit.parameters()).device):
                self.unit.get_submodule(graph.prefix)(*args, **kwargs)
        except Exception as error:  # foreign code on inputs that it may not expect
            raise OwnCodeFails(f"its own code fails on small random inputs: {error}") from error
        finally:
            handle.remove()
        if not seen:
            raise Refuse("a real call of the module differs from the captured one")
        return seen[0]


def run(
    program: Program, owner: nn.Module, tensors: Sequence[Tensor], used: list[int] | None = None
) -> tuple[Values, list[int]]:
    """Outputs and gradients of `program(owner, *tensors)`.

    Args:
        used: which leaves of the result count; by default every floating tensor, and returned.
    """
    inputs = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    torch.manual_seed(0)
    leaves = pytree.tree_leaves(program(owner, *inputs))
    if used is None:
        used = [i for i, leaf in enumerate(leaves) if _is_floating(leaf)]
    outputs = [leaves[i] for i in used]
    sources = {f"input {i}": t for i, t in enumerate(inputs) if t.requires_grad}
    sources |= {n: p for n, p in owner.named_parameters() if p.requires_grad}
    cotangents = [_draw(o, i) for i, o in enumerate(outputs)]
    differentiable = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in differentiable],
        list(sources.values()),
        [c for _, c in differentiable],
        allow_unused=True,
        materialize_grads=True,
    )
    named = {f"output {i}": o.detach() for i, o in zip(used, outputs, strict=True)}
    return named | {f"gradient of {n}": g for n, g in zip(sources, grads, strict=True)}, used


def _draw(like: Tensor, seed: int) -> Tensor:
    """The same numbers for every dtype, also where narrower ones are widened."""
    return torch.randn(like.shape, generator=_seeded(seed), dtype=torch.float64).to(like)


def _run_rewrite(
    program: Program, owner: nn.Module, tensors: list[Tensor]
) -> tuple[Values, list[int]]:
    try:
        return run(program, owner, tensors)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # a kernel's own refusal
        raise Refuse(f"verification failed: the rewrite does not run: {error}") from error


def _program(unit: UnitGraph, stage: fx.Graph, call: int) -> Program:
    """One call as it stood at an earlier stage of the unit's graph, on a rank by itself."""
    return on_one_rank(cut(dataclasses.replace(unit, graph=stage), call).graph, "stage")


def _is_verifiable(unit: nn.Module, level: str) -> bool:
    parameters = list(unit.parameters())
    if level == "off" or not parameters or any(p.is_meta for p in parameters):
        return False
    size = sum(p.numel() * p.element_size() for p in parameters)
    return level != "auto" or size <= _LIMIT_BYTES


def _own_forward(call_args: tuple[tuple[Any, ...], dict[str, Any]]) -> Program:
    """The module's class's forward, as a program of the tensors among its arguments."""
    leaves, spec = pytree.tree_flatten(call_args)

    def program(owner: nn.Module, *tensors: Tensor) -> Any:
        fresh = iter(tensors)
        filled = [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return type(owner).forward(owner, *args, **kwargs)

    return program


def _example_call(
    graph: UnitGraph, device: torch.device, seed: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Small random arguments of the unit, of the form that was captured."""
    call = graph.calls[0]
    begins = next(n for n in graph.captured.nodes if n.target is enter and n.args[0] == 0)
    leaves = list(call.inputs)
    nodes: list[Any] = list(begins.args[1:])
    fakes = [node.meta["val"] for node in nodes]
    for position, node, sizes in zip(call.tensor_inputs, nodes, example_sizes(fakes), strict=True):
        leaves[position] = _example(node, sizes, device, seed)
    args, kwargs = pytree.tree_unflatten(leaves, call.input_spec)
    flags = {n for n, v in kwargs.items() if isinstance(v, Untouched)}
    flags -= {n for n, v in kwargs.items() if issubclass(type(v), UntouchedStore)}
    return args, {n: v for n, v in kwargs.items() if n not in flags}


def _example(node: fx.Node, sizes: list[int], device: torch.device, seed: int) -> Tensor:
    """Random numbers; a causal mask for booleans; positions or ids for integers; or a mask."""
    fake: Tensor = node.meta["val"]
    if "ones" in node.meta:
        return example_mask(sizes, node.meta["ones"]).to(device, fake.dtype)
    if "choices" in node.meta:
        return example_ids(sizes, node.meta["choices"]).to(device, fake.dtype)
    generator = _seeded(100 * seed + len(sizes))
    if fake.is_floating_point():
        return torch.randn(sizes, generator=generator).to(device, fake.dtype)
    if fake.dtype == torch.bool:
        return torch.ones(sizes, dtype=torch.bool, device=device).tril()
    return torch.arange(sizes[-1], device=device).expand(sizes).to(fake.dtype)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _in_float64(
    program: Program, owner: nn.Module, tensors: list[Tensor], used: list[int]
) -> Values:
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    with InFloat64(), AnyDtypeGroupedMM():
        return run(program, copy.deepcopy(owner).double(), wide, used)[0]


def _scales(reference: Values) -> dict[str, float]:
    """What the error of every value is measured by: its L2 norm.

    A value that is zero but for rounding, such as the gradient of a single pick's score that is
    divided by itself, has no relative error: it is measured by the largest norm.
    """
    norms = {name: value.double().norm().item() for name, value in reference.items()}
    largest = max(norms.values())
    return {n: norm if norm > _ROUNDING * largest else largest for n, norm in norms.items()}


def _errors(values: Values, reference: Values, scales: dict[str, float]) -> dict[str, float]:
    """The L2 error of every value beside its scale; absolute where everything is zero."""
    return {
        name: (value.double() - reference[name].double()).norm().item() / (scales[name] or 1.0)
        for name, value in values.items()
    }


def _epsilon(owner: nn.Module, tensors: list[Tensor]) -> float:
    """The rounding of the coarsest float that takes part."""
    dtypes = {t.dtype for t in [*tensors, *owner.parameters()] if t.is_floating_point()}
    if torch.is_autocast_enabled(tensors[0].device.type):
        dtypes.add(torch.get_autocast_dtype(tensors[0].device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _prove_over_field(
    before: Program, after: Program, owner: nn.Module, tensors: list[Tensor], used: list[int]
) -> None:
    """The exact proof, with the owner's parameters as inputs."""
    module = copy.deepcopy(owner).double()
    names = [name for name, _ in module.named_parameters()]
    wide = [t.double() if t.is_floating_point() else t for t in tensors]

    def function(program: Program) -> Program:
        def call(*values: Tensor) -> list[Tensor]:
            holder = _Holder(module, program)
            state = {f"module.{n}": v for n, v in zip(names, values[len(wide) :], strict=True)}
            result = torch.func.functional_call(holder, state, values[: len(wide)])
            leaves = pytree.tree_leaves(result)
            return [leaves[i] for i in used]

        return call

    parameters = [p.detach() for p in module.parameters()]
    try:
        with AnyDtypeGroupedMM():
            prove(function(before), function(after), [*wide, *parameters])
    except Disproved as disproof:
        raise Refuse(f"disproved over a prime field: {disproof}") from None
    except NotImplementedError as unknown:
        raise Refuse(f"cannot be proven over a prime field: {unknown}") from None


class _Holder(nn.Module):
    """Gives a program of a module the calling convention of a module."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__()
        self.module = module
        self.program = program

    def forward(self, *tensors: Tensor) -> Any:
        return self.program(self.module, *tensors)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
