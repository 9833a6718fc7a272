import torch

from moe_compile.ops import combine


def test_rows_of_one_token_are_summed_without_weights() -> None:
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    handle = [torch.tensor([1, 0, 1])]
    want = torch.stack([y[1], y[0] + y[2], torch.zeros(4, dtype=torch.float64)])
    torch.testing.assert_close(combine(y, handle, 3, "world"), want)
    assert torch.autograd.gradcheck(lambda y: combine(y, handle, 3, "world"), (y,))
