"""What an experts block keeps, by each kind of products; quack's are emulated on a CPU."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moe_compile.kernels import gathered_products, grouped_products, quack
from moe_compile.kernels.activation import activate, is_fusable, register
from moe_compile.kernels.expert_block import (
    Where,
    product_collect,
    spread_product,
    weighed_product_collect,
)
from moe_compile.kernels.expert_rows import group_picks
from tests.kernels import emulators
from tests.kernels.test_activation import swiglu

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
HAS_QUACK = (
    torch.cuda.is_available()
    and torch.cuda.get_device_capability() == (9, 0)
    and importlib.util.find_spec("quack") is not None
)


def on_a_gpu(name: str, here: bool, needs: str) -> Any:
    marks = [pytest.mark.gpu, pytest.mark.skipif(not here, reason=f"needs {needs}")]
    return pytest.param((name, "cuda"), marks=marks)


BOTH = [
    (grouped_products.NAME, "cpu"),
    (quack.NAME, "cpu"),
    (gathered_products.NAME, "cpu"),
    on_a_gpu(grouped_products.NAME, CAPABLE, "a GPU with bfloat16"),
    on_a_gpu(quack.NAME, HAS_QUACK, "a Hopper GPU and quack-kernels"),
    on_a_gpu(gathered_products.NAME, CAPABLE, "a GPU with bfloat16"),
]
BF16 = torch.bfloat16
E, H, WIDTH, OUT = 4, 32, 24, 40

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True, params=BOTH, ids="-".join)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The name of products; the default device is theirs."""
    torch.manual_seed(0)
    name, device = request.param
    if device == "cpu":
        monkeypatch.setattr(quack, "library", lambda: emulators.QUACK)
    with torch.device(device):
        yield name


def located(products: str, picks: int, ids: Tensor) -> Where:
    locate = quack.where_rows_are if products == quack.NAME else Where
    return locate(picks, *group_picks(ids, E))


def key_of_swiglu() -> str:
    key = register(make_fx(swiglu)(torch.ones(3, 2 * WIDTH, device="cpu")).graph)
    assert is_fusable(key, 2 * WIDTH)
    return key


def test_gradients_are_laid_out_like_their_weights(products: str) -> None:
    where = located(products, 2, torch.tensor([[0, 3], [1, 2]]))
    x = torch.randn(2, H, dtype=BF16)
    for w in (torch.randn(E, WIDTH, H, dtype=BF16), torch.randn(E, H, WIDTH, dtype=BF16).mT):
        w.requires_grad_()
        rows = spread_product(products, x, w, where, transposed=True)
        (first,) = torch.autograd.grad(rows.sum(), w)
        out = product_collect(products, rows.detach(), w, where, transposed=False)
        (second,) = torch.autograd.grad(out.sum(), w)
        assert first.stride() == second.stride() == w.stride()


def test_what_is_weighed_compiles(products: str) -> None:
    torch.compiler.reset()
    key = key_of_swiglu()

    def run(rows: Tensor, weight: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        where = located(products, 2, ids)
        return weighed_product_collect(products, rows, weight, key, w, where, True)

    backend = "aot_eager" if torch.get_default_device().type == "cpu" else "inductor"
    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (9, 33):
        w = torch.randn(E, OUT, WIDTH, dtype=BF16)
        rows = torch.randn(2 * tokens, 2 * WIDTH, dtype=BF16)
        weight, ids = torch.rand(2 * tokens, 1), torch.randint(E, (tokens, 2))
        given = [t.requires_grad_() for t in (rows, weight, w)]
        outs = compiled(rows, weight, w, ids), run(rows, weight, w, ids)
        found = [[out, *torch.autograd.grad(out.sum(), given)] for out in outs]
        for value, wanted in zip(*found, strict=True):
            torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_what_is_weighed_is_not_kept(products: str, tokens: int) -> None:
    key = key_of_swiglu()
    where = located(products, 2, torch.randint(-1, E, (tokens, 2)))
    w, rows = torch.randn(E, OUT, WIDTH, dtype=BF16), torch.randn(2 * tokens, 2 * WIDTH, dtype=BF16)
    weight = torch.rand(2 * tokens, 1)
    given = [t.requires_grad_() for t in (rows, weight, w)]
    grad = torch.randn(tokens, OUT, dtype=BF16)

    def results(out: Tensor) -> list[Tensor]:
        real = int(where.offs[-1])
        of_rows, of_weight, of_w = torch.autograd.grad(out, given, grad)
        return [out.detach(), of_rows[:real], of_weight[:real], of_w]

    got = results(weighed_product_collect(products, rows, weight, key, w, where, True))
    weighed = activate(rows, weight, where.offs, key)
    wanted = results(product_collect(products, weighed, w, where, True))
    for value, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, right)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_keeps_its_tokens_and_its_preactivation(products: str, compiled: bool) -> None:
    """Eight picks of a token would be eight rows of it; a compiler may not keep them either."""
    torch.compiler.reset()
    key = key_of_swiglu()
    tokens, picks, before = 64, 8, 2 * WIDTH
    ids = torch.randint(E, (tokens, picks))
    leaves = torch.randn(tokens, H), torch.rand(tokens, picks)
    leaves += torch.randn(E, before, H), torch.randn(E, OUT, WIDTH)
    x, weights, up, down = (t.to(BF16).requires_grad_() for t in leaves)

    def block(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        where = located(products, picks, ids)
        rows = spread_product(products, x, up, where, True)
        weight = weights.reshape(-1, 1).index_select(0, where.order)
        return weighed_product_collect(products, rows, weight, key, down, where, True)

    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.is_floating_point() and not isinstance(t, torch.nn.Parameter):
            kept[t.data_ptr()] = t.numel()
        return t

    run = torch.compile(block, fullgraph=True) if compiled else block
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = run(x, ids, weights, up, down)
    given = {t.data_ptr() for t in (weights, up, down)}
    numbers = sum(count for pointer, count in kept.items() if pointer not in given)
    assert 0 <= numbers - tokens * (H + picks * before) <= tokens * picks
    out.sum().backward()
