"""Products of eight-bit numbers against their references, on the CPU and on a GPU."""

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile import ops
from moe_compile.kernels import transformer_engine_fp8 as te_fp8
from moe_compile.kernels.fp8 import (
    experts_problem,
    fp8_grouped_linear,
    fp8_grouped_mm,
    fp8_linear,
    fp8_mm,
    linear_problem,
)
from moe_compile.ops.fp8 import E4M3, E5M2, RECIPES, ROW, Recipe, expert_product, quantize
from moe_compile.providers import formula
from moe_compile.providers import torch as torch_provider
from tests.kernels import fp8_emulator

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
HAS_TE = CAPABLE and importlib.util.find_spec("transformer_engine") is not None
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not CAPABLE, reason="needs a GPU with FP8")],
)
GPU_TE = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not HAS_TE, reason="needs a GPU with FP8 and transformer_engine"),
    ],
)
BF16 = torch.bfloat16


def normal(*shape: int, device: str = "cpu", dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    scale = wanted.double().norm() or torch.ones(())
    return float((found.double() - wanted.double()).norm() / scale)


def run(fn: Callable[..., Tensor], *args: Any, **options: Any) -> list[Tensor]:
    """The result, and gradients of floating tensors."""
    leaves = [
        t.detach().clone().requires_grad_()
        if isinstance(t, Tensor) and t.is_floating_point()
        else t
        for t in args
    ]
    out = fn(*leaves, **options)
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    grad = normal(*out.shape, device=str(out.device), dtype=out.dtype, seed=7)
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def assert_near(found: list[Tensor], wanted: list[Tensor], limit: float = 1e-2) -> None:
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert error(a, b) < limit, i


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("shape", "count"), [((2, 64, 256), 384), ((1, 77, 128), 128), ((1000, 768), 256)]
)
def test_linear(shape: tuple[int, ...], count: int, recipe: Recipe, device: str) -> None:
    x, weight = normal(*shape, device=device), normal(count, shape[-1], device=device, seed=1)
    bias = normal(count, device=device, seed=2)
    wanted = run(ops.fp8_linear.reference, x, weight, bias, recipe=recipe)
    assert_near(run(fp8_linear, x, weight, bias, recipe=recipe), wanted)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_without_rows_or_gradients(recipe: Recipe, device: str) -> None:
    weight = normal(128, 128, device=device)
    for found in run(fp8_linear, normal(0, 128, device=device), weight, recipe=recipe)[::2]:
        assert not found.any()
    x = normal(3, 128, device=device).requires_grad_()
    fp8_linear(x, weight, recipe=recipe).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_linear_compiles_in_one_graph(recipe: Recipe, device: str) -> None:
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(fp8_linear, fullgraph=True, backend=backend, dynamic=True)
    weight = normal(256, 128, device=device, seed=1)
    for rows in (40, 77, 256):
        x = normal(2, rows, 128, device=device)
        wanted = run(ops.fp8_linear.reference, x, weight, recipe=recipe)
        assert_near(run(compiled, x, weight, recipe=recipe), wanted)


def grouped(
    device: str, counts: list[int], tail: int, sizes: tuple[int, int]
) -> tuple[Tensor, ...]:
    offs = torch.tensor(counts).cumsum(0).int().to(device)
    rows = normal(sum(counts) + tail, sizes[0], device=device)
    return rows, normal(len(counts), *sizes[::-1], device=device, seed=1), offs


def loop(x: Tensor, w: Tensor, offs: Tensor, recipe: Recipe) -> Tensor:
    """The product of each group by `expert_product`."""
    ends = [0, *offs.tolist()]
    rows = itertools.starmap(slice, itertools.pairwise(ends))
    pairs = zip(rows, w, strict=True)
    return torch.cat([expert_product(x[own], matrix, recipe) for own, matrix in pairs])


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("counts", [[30, 0, 50, 1], [0, 0, 0, 77], [200, 129, 128, 3, 300]])
def test_grouped_linear(counts: list[int], recipe: Recipe, view: bool, device: str) -> None:
    x, w, offs = grouped(device, counts, 0, (64, 48) if recipe == "current" else (256, 384))
    given = (x, w.mT.contiguous(), offs) if view else (x, w, offs, True)
    found = run(fp8_grouped_linear, *given, recipe=recipe)
    found[2] = found[2].mT if view else found[2]
    assert_near(found, run(loop, x, w, offs, recipe=recipe))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_of_no_group_touch_nothing(recipe: Recipe, device: str) -> None:
    x, w, offs = grouped(device, [30, 2], 9, (256, 128))
    x[32:] = torch.nan
    out, grad_x, grad_w = run(fp8_grouped_linear, x, w, offs, True, recipe=recipe)
    want_out, want_x, want_w = run(fp8_grouped_linear, x[:32], w, offs, True, recipe=recipe)
    # The cotangents differ in what they are for the rows beyond.
    assert torch.equal(out[:32], want_out)
    assert error(grad_x[:32], want_x) == error(grad_w, want_w) == 0.0


def swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("provider", [torch_provider, formula], ids=["torch", "formula"])
def test_experts(provider: Any, recipe: Recipe, device: str) -> None:
    """In bfloat16 a number that is rounded in another order may fall to its other neighbour.

    The gradient of the routing weights is what the rows give before or after the last product: two
    sums of as much noise.
    """
    fn = provider._IMPLEMENTATIONS[ops.experts]
    kind: dict[str, Any] = {"device": device, "dtype": BF16 if device == "cuda" else torch.float32}
    x, weights = normal(60, 128, **kind), normal(60, 2, **kind, seed=1).softmax(-1)
    up, down = normal(8, 256, 128, **kind, seed=2), normal(8, 128, 128, **kind, seed=3)
    ids = torch.arange(120, device=device).view(60, 2) * 7 % 6  # two get none
    given = x, ids, weights, up, down, swiglu
    wanted = run(ops.experts.reference, *given, recipe=recipe)
    found = run(fn, *given, recipe=recipe)
    assert error(found.pop(2), wanted[2]) < 0.1
    assert_near(found, wanted[:2] + wanted[3:], 5e-2 if device == "cuda" else 1e-2)
    for rounded, exact in zip(wanted, run(ops.experts.reference, *given), strict=True):
        assert 1e-3 < error(rounded, exact) < 0.12


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_operators_have_true_fakes(device: str) -> None:
    """The other checks of `opcheck` compute with eight-bit numbers, which torch does not."""
    a, b = (normal(n, 32, device=device) for n in (8, 16))
    for dtype in (E4M3, E5M2):
        (qa, sa), (qb, sb) = quantize(a, dtype, (None, None)), quantize(b, E4M3, (None, None))
        given = qa, qb, sa, sb, BF16, False
        torch.library.opcheck(fp8_mm, given, test_utils="test_faketensor")
    x, w, offs = grouped(device, [3, 5], 1, (32, 16))
    (qa, sa), (qb, sb) = quantize(x, E4M3, ROW), quantize(w, E4M3, ROW)
    given = qa, qb, sa, sb, offs, BF16
    torch.library.opcheck(fp8_grouped_mm, given, test_utils="test_faketensor")


@pytest.mark.gpu
@pytest.mark.skipif(not CAPABLE, reason="needs a GPU with FP8")
@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_do_not_wait_for_the_device(recipe: Recipe) -> None:
    x, w, offs = grouped("cuda", [30, 0, 50, 1], 0, (256, 128))
    x, w = x.requires_grad_(), w.requires_grad_()
    fp8_grouped_linear(x, w, offs, True, recipe=recipe).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fp8_grouped_linear(x, w, offs, True, recipe=recipe).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("sizes", "recipe", "reason"),
    [
        ((32, 48), "current", None),
        ((32, 40), "current", "multiples of 16: its weight is 32 x 40"),
        ((1, 32), "current", "multiples of 16: its weight is 1 x 32"),
        ((128, 256), "blockwise", None),
        ((128, 192), "blockwise", "multiples of 128: its weight is 128 x 192"),
    ],
)
def test_sizes_that_are_refused(sizes: tuple[int, int], recipe: Recipe, reason: str | None) -> None:
    found = linear_problem(BF16, torch.empty(sizes), recipe)
    assert found == (reason and f"FP8 products take sizes that are {reason}")
    assert experts_problem(torch.empty(2, *sizes), torch.empty(2, *sizes), recipe) == found


@pytest.mark.parametrize("device", ["cpu", GPU_TE])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows", [77, 128])
def test_transformer_engine(
    rows: int, recipe: Recipe, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU it is emulated."""
    if device == "cpu":
        monkeypatch.setattr(te_fp8, "library", lambda: fp8_emulator)
        monkeypatch.setattr(te_fp8, "gemm", fp8_emulator.gemm)
    x, weight = normal(2, rows, 256, device=device), normal(128, 256, device=device, seed=1)
    wanted = run(ops.fp8_linear.reference, x, weight, recipe=recipe)
    assert_near(run(te_fp8.fp8_linear, x, weight, recipe=recipe), wanted)
    torch.compiler.reset()
    compiled = torch.compile(te_fp8.fp8_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_near(run(compiled, x, weight, recipe=recipe), wanted)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_linear_in_other_dtypes(dtype: torch.dtype, recipe: Recipe, device: str) -> None:
    x = normal(40, 256, device=device, dtype=dtype)
    weight = normal(128, 256, device=device, dtype=dtype, seed=1)
    wanted = run(ops.fp8_linear.reference, x, weight, recipe=recipe)
    assert_near(run(fp8_linear, x, weight, recipe=recipe), wanted)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_linear_under_autocast(device: str) -> None:
    x = normal(40, 64, device=device, dtype=torch.float32)
    weight = normal(32, 64, device=device, dtype=torch.float32, seed=1)
    with torch.autocast(device, torch.bfloat16):
        found = run(fp8_linear, x, weight)
        wanted = run(ops.fp8_linear.reference, x, weight)
    assert found[0].dtype == torch.bfloat16
    assert_near(found, wanted)
