import pytest
import torch
from torch import Tensor

from moe_compile.kernels.grouped_mm import grouped_mm, grouped_mm_weight_grad
from moe_compile.verify.oracle import Disproved
from moe_compile.verify.parity import prove  # the oracle, with the meanings registered

ENDS = [3, 3, 4]
X, W = torch.randn(6, 5, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
G = torch.randn(6, 4, dtype=torch.float64)
OFFS = torch.tensor(ENDS, dtype=torch.int32)


def loop(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return torch.cat([x[:3] @ w[0], x[3:4] @ w[2], x.new_zeros(2, 4)])


def loop_weight_grad(x: Tensor, g: Tensor, offs: Tensor) -> Tensor:
    return torch.stack([x[:3].t() @ g[:3], x.new_zeros(5, 4), x[3:4].t() @ g[3:4]])


def test_grouped_mm_is_the_loop_backward_too() -> None:
    prove(loop, grouped_mm, (X, W, OFFS))


def test_grouped_mm_of_a_transposed_view_is_the_loop() -> None:
    prove(
        lambda x, w, offs: loop(x, w.mT, offs),
        lambda x, w, offs: grouped_mm(x, w.mT, offs),
        (X, W.mT.contiguous(), OFFS),
    )


def test_the_gradient_operator_is_the_loop() -> None:
    prove(
        lambda x, g, offs: loop_weight_grad(x.detach(), g.detach(), offs),
        lambda x, g, offs: grouped_mm_weight_grad(x.detach(), g.detach(), offs),
        (X, G, OFFS),
    )


def test_another_expert_is_disproved() -> None:
    with pytest.raises(Disproved, match=r"^output 0 differs in 16 of 24 elements"):
        prove(loop, lambda x, w, offs: grouped_mm(x, w.roll(1, 0), offs), (X, W, OFFS))


def test_a_lost_gradient_is_disproved() -> None:
    with pytest.raises(Disproved, match=r"^the gradient of input 1 differs in 40 of 60 elements$"):
        prove(loop, lambda x, w, offs: grouped_mm(x, w.detach(), offs), (X, W, OFFS))
