import pytest
import torch
from torch import Tensor

from moe_compile import ops
from moe_compile.kernels.top_k import misfit, top_k

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def check(x: Tensor, k: int) -> None:
    """Values as torch's; of equal ones the first come first; gradients go where they are from."""
    values, ids = top_k(x, k)
    order = x.float().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    assert torch.equal(values, x.topk(k, dim=-1).values)
    assert torch.equal(x.gather(-1, ids), values)
    if x.is_cuda:
        assert torch.equal(ids, order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 9).to(dtype).requires_grad_()
    check(x.detach(), 3)
    (own,) = torch.autograd.grad(top_k(x, 3)[0].square().sum(), x)
    (want,) = torch.autograd.grad(ops.top_k(x, 3)[0].square().sum(), x)
    assert torch.equal(own, want)


def test_the_op() -> None:
    x = torch.randn(4, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.moe_compile.top_k.default, (x, 2))


@pytest.mark.parametrize(
    ("x", "k", "reason"),
    [
        (torch.empty(2, 8), 2, "runs on cuda: got cpu"),
        (torch.empty(2, 8, device="meta"), 2, "runs on cuda: got meta"),
    ],
)
def test_what_there_is_no_kernel_for(x: Tensor, k: int, reason: str) -> None:
    assert reason in (misfit(x, k) or "")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 37, 4096])
@pytest.mark.parametrize(("width", "k"), [(2, 2), (8, 2), (60, 4), (128, 8), (513, 22)])
def test_on_a_gpu(width: int, k: int, rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, width, device="cuda").to(dtype)
    assert misfit(x, k) is None
    check(x, k)
    check(x.round(), k)  # many are equal


@pytest.mark.gpu
@gpu
def test_special_numbers() -> None:
    x = torch.tensor([[1.0, torch.nan, -torch.inf, torch.inf, -2.0]], device="cuda")
    values, ids = top_k(x, 5)
    torch.testing.assert_close(values, x.topk(5).values, equal_nan=True)
    assert ids.tolist() == [[1, 3, 0, 4, 2]]


@pytest.mark.gpu
@gpu
def test_what_is_too_long() -> None:
    x = torch.empty(2, 2000, device="cuda")
    assert "takes up to 32 of 1024: got 4 of 2000" in (misfit(x, 4) or "")
    assert "floats of up to 32 bits" in (misfit(x.double(), 4) or "")
