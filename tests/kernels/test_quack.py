"""Experts by quack: its own kernels where they are, and plain torch elsewhere."""

import importlib.util
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile.kernels import quack
from moe_compile.kernels.expert_rows import group_picks
from moe_compile.kernels.quack import quack_product, quack_weight_grad, where_rows_are
from moe_compile.ops import experts
from moe_compile.providers.quack import QuackProvider
from tests.kernels import emulators
from tests.providers.test_torch import NoWaiting, assert_close, leaf, swiglu

HERE = (
    torch.cuda.is_available()
    and torch.cuda.get_device_capability() == (9, 0)
    and importlib.util.find_spec("quack") is not None
)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not HERE, reason="needs a Hopper GPU and quack-kernels"),
            pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
        ],
    ),
]
FN = QuackProvider().implementation(experts)
BF16 = torch.bfloat16
E, H, WIDTH, OUT = 4, 32, 24, 40


@pytest.fixture(autouse=True, params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The default device; on the CPU quack is emulated."""
    torch.manual_seed(0)
    if request.param == "cpu":
        monkeypatch.setattr(quack, "library", lambda: emulators.QUACK)
    with torch.device(request.param):
        yield request.param


def matrices(transposed: bool, biased: bool) -> list[Tensor]:
    shapes = [(H, 2 * WIDTH), (WIDTH, OUT)]
    stored = [leaf(E, *(shape if transposed else shape[::-1])) for shape in shapes]
    return stored + ([leaf(E, 2 * WIDTH), leaf(E, OUT)] if biased else [])


def check(ids: Tensor, fn: Any = FN, transposed: bool = False, biased: bool = False) -> None:
    tokens, picks = ids.shape
    up, down, *biases = matrices(transposed, biased)
    args = (leaf(tokens, H), ids, leaf(tokens, picks), up, down, swiglu, *biases)
    assert_close(experts, BF16, *args, fn=fn, transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 13, 700])
def test_experts(tokens: int, biased: bool, transposed: bool) -> None:
    check(torch.randint(-1, E, (tokens, 2)), transposed=transposed, biased=biased)


@pytest.mark.parametrize("fill", [-1, 0, E - 1])
@pytest.mark.parametrize("tokens", [1, 300])
def test_one_expert_takes_all(tokens: int, fill: int) -> None:
    check(torch.full((tokens, 1), fill))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiles_for_any_number_of_tokens(device: str) -> None:
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(FN, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (9, 33, 1, 0):
        check(torch.randint(-1, E, (tokens, 2)), fn=compiled)


@pytest.mark.parametrize("biased", [False, True])
def test_tokens_without_a_pick_may_be_anything(biased: bool) -> None:
    """NaN in them, in their weights and in their gradients reaches nothing else."""
    ids = torch.randint(-1, E, (70, 2))
    ids[60:] = -1
    found: list[list[Tensor]] = []
    leaves = [leaf(70, H), leaf(70, 2), *matrices(False, biased)]
    for garbage in (0.0, float("nan")):
        inputs = [t.detach().to(BF16).requires_grad_() for t in leaves]
        x, weights, up, down, *biases = inputs
        x.data[60:] = weights.data[60:] = garbage
        grad = torch.ones(70, OUT, dtype=BF16)
        grad[60:] = garbage
        out = FN(x, ids, weights, up, down, swiglu, *biases)
        grads = torch.autograd.grad(out, inputs, grad)
        found.append([out[:60], grads[0][:60], grads[1][:60], *grads[2:]])
    for clean, value in zip(*found, strict=True):
        assert torch.equal(clean, value)
        assert bool(value.isfinite().all())


def test_nothing_waits_for_the_device(device: str) -> None:
    if device == "cpu":
        pytest.skip("the emulated kernels are loops over groups")
    leaves = [leaf(70, H), leaf(70, 2), *matrices(False, False)]
    x, weights, up, down = (t.detach().to(BF16).requires_grad_() for t in leaves)
    ids = torch.randint(-1, E, (70, 2))
    with NoWaiting():
        FN(x, ids, weights, up, down, swiglu).sum().backward()


@pytest.mark.parametrize("sizes", [(5, 3, 1), (513, 8, 9)])
@pytest.mark.parametrize("shape", [(64, 192), (96, 264), (1032, 256), (2048, 512)])
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_products(
    sizes: tuple[int, int, int], shape: tuple[int, int], view: bool, transposed: bool
) -> None:
    """Sizes that no tile divides; groups of no rows; and weights that are views."""
    tokens, groups, picks = sizes
    ids = torch.randint(-1, groups, (tokens, picks))
    ids[ids == 1] = 0
    where = where_rows_are(picks, *group_picks(ids, groups))
    assert where.tokens is not None
    assert where.ends is not None
    real = int(where.offs[-1])
    wanted_shape = shape[::-1] if transposed else shape
    stored = wanted_shape[::-1] if view else wanted_shape
    x, w = torch.randn(tokens, shape[0], dtype=BF16), torch.randn(groups, *stored, dtype=BF16)
    w = w.mT if view else w
    ends = where.ends.tolist()
    gathered = x[where.tokens[:real].long()].double()
    matrices_of = (w.mT if transposed else w).double()
    wanted = [gathered[s:e] @ m for s, e, m in zip(ends, ends[1:], matrices_of, strict=False)]
    for given, tokens_of in ((x, where.tokens), (x[where.tokens.long()], None)):
        got = quack_product(given, w, where.ends, tokens_of, transposed)
        assert got.shape == (tokens * picks, shape[1])
        near(got[:real], torch.cat(wanted))
    rows = torch.randn(tokens * picks, shape[1], dtype=BF16)
    outer = [gathered[s:e].T @ rows[s:e].double() for s, e in pairwise(ends)]
    for given, tokens_of in ((x, where.tokens), (x[where.tokens.long()], None)):
        grad = quack_weight_grad(given, rows, where.ends, tokens_of, transposed)
        near(grad.mT if transposed else grad, torch.stack(outer))
        assert bool(grad[1].eq(0).all())


def near(got: Tensor, wanted: Tensor) -> None:
    assert (got.double() - wanted).norm() <= 0.005 * wanted.norm()


def test_what_needs_no_gradient_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quack, "quack_weight_grad", None)
    leaves = [leaf(9, H), leaf(9, 2), *matrices(False, False)]
    x, weights, up, down = (t.detach().to(BF16) for t in leaves)
    x.requires_grad_()
    ids = torch.randint(0, E, (9, 2))
    FN(x, ids, weights, up, down, swiglu).sum().backward()
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_operators_are_sound() -> None:
    where = where_rows_are(2, *group_picks(torch.tensor([[0, 3], [3, 1]]), E))
    x, w = torch.randn(2, H, dtype=BF16), torch.randn(E, WIDTH, H, dtype=BF16)
    torch.library.opcheck(quack_product, (x, w, where.ends, where.tokens, True))
    rows = quack_product(x, w, where.ends, where.tokens, True)
    torch.library.opcheck(quack_product, (rows, w, where.ends, None, False))
    for transposed in (False, True):
        args = (x, rows, where.ends, where.tokens, transposed)
        torch.library.opcheck(quack_weight_grad, args)
