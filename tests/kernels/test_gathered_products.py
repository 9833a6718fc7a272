"""Products that gather rows, against plain ones of rows that were gathered before."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moe_compile.kernels.expert_rows import group_picks
from moe_compile.kernels.gathered_products import gathered_product, gathered_weight_grad

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
gpu = pytest.mark.skipif(not CAPABLE, reason="needs a GPU with bfloat16")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])]
E, K = 5, 2


@pytest.fixture(autouse=True, params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """The default device."""
    torch.manual_seed(0)
    with torch.device(request.param):
        yield


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.is_contiguous()
    assert found.shape == wanted.shape
    error = (found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
    assert error < 5e-3


def routed(tokens: int, spread: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The order, the ends of the groups, and the token of each row."""
    ids = torch.randint(-1, E, (tokens, K)) if spread else torch.full((tokens, K), 3)
    order, _, offs = group_picks(ids, E)
    return order, offs, order[: int(offs[-1])].long() // K


@pytest.mark.parametrize("tokens", [1, 13, 700])
@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("sizes", [(64, 256), (40, 72), (520, 264)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(
    tokens: int, spread: bool, sizes: tuple[int, int], transposed: bool, dtype: torch.dtype
) -> None:
    order, offs, token = routed(tokens, spread)
    count, (depth, columns) = len(token), sizes
    x, rows = torch.randn(tokens, depth).to(dtype), torch.randn(tokens * K, columns).to(dtype)
    rows[count:] = torch.nan
    w = torch.randn(E, depth, columns).to(dtype)
    own, starts = x.double()[token], [0, *offs.tolist()]
    groups = [slice(starts[e], starts[e + 1]) for e in range(E)]
    stored = w.mT.contiguous() if transposed else w
    wanted = torch.cat([own[g] @ w[e].double() for e, g in enumerate(groups)])
    gathered = torch.full((tokens * K, depth), torch.nan, dtype=dtype)
    gathered[:count] = x[token]
    for source, by in ((x, order), (gathered, None)):
        for matrices in (stored, stored.mT.contiguous().mT):
            found = gathered_product(source, matrices, by, offs, K, transposed)
            close(found[:count], wanted)
        grad = torch.stack([own[g].T @ rows[g].double() for g in groups])
        found = gathered_weight_grad(source, rows, by, offs, K, transposed)
        close(found, grad.mT if transposed else grad)


def test_no_tokens() -> None:
    order, offs, _ = routed(0, True)
    x, rows = torch.empty(0, 64).bfloat16(), torch.empty(0, 32).bfloat16()
    w = torch.randn(E, 64, 32).bfloat16()
    assert gathered_product(x, w, order, offs, K, False).shape == (0, 32)
    assert not gathered_weight_grad(x, rows, order, offs, K, True).any()
