import pytest
import torch

from moe_compile.kernels.deep_ep_layout import dispatch_layout

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def picked(tokens: int, experts: int, picks: int) -> torch.Tensor:
    ids = torch.rand(tokens, experts).argsort(1)[:, :picks]
    return torch.where(torch.rand(tokens, picks) < 0.2, -1, ids)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("tokens", "experts", "picks", "ranks"),
    [(0, 8, 2, 2), (1, 8, 1, 4), (37, 60, 5, 4), (4096, 128, 8, 4), (5000, 256, 8, 8)],
)
def test_on_a_gpu(tokens: int, experts: int, picks: int, ranks: int) -> None:
    ids = picked(tokens, experts, picks)
    found = dispatch_layout(ids.cuda(), experts, ranks)
    for got, want in zip(found, dispatch_layout(ids, experts, ranks), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.cpu(), want)
