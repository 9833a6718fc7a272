import torch

from moe_compile.ops import combine, dispatch


def test_one_rank_keeps_its_tokens() -> None:
    x, weights = torch.randn(5, 4), torch.rand(5, 2)
    ids = torch.tensor([[0, 1], [2, -1], [3, 3], [-1, -1], [1, 0]])
    rows, local_ids, local_weights, places, handle = dispatch(x, ids, weights, 4, "world")
    assert torch.equal(rows, x)
    assert torch.equal(local_ids, ids)
    assert torch.equal(local_weights, weights)
    assert places.shape == (ids.numel(), 0)
    assert torch.equal(combine(rows, handle, 5, "world"), x)
