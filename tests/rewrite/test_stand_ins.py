"""Random functions in the place of experts cost as much for one expert, however many there are."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_compile.rewrite.stand_ins import StandIns


class _Largest(TorchDispatchMode):
    """The largest number of elements that an operator gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and func is not torch.ops.aten.stack.default:
            self.elements = max(self.elements, result.numel())
        return result


def test_the_gradient_of_one_expert_is_no_larger_than_its_part_of_the_stack() -> None:
    up = torch.randn(64, 8, 2, requires_grad=True)
    narrow = torch.randn(3, 2)
    stand_ins = StandIns(up, None, torch.randn(2, 6), narrow, torch.randn(64, 2, 8), None, None)

    with _Largest() as largest:
        results = [torch.ones(1, 8) @ stand_ins.part("up", expert) for expert in (0, 5, 63)]
        (gradient,) = torch.autograd.grad(torch.cat(results).sum(), up)

    assert largest.elements <= 64
    assert gradient[5].eq(1).all()
    assert gradient[6].eq(0).all()


def test_no_rows_give_none() -> None:
    sizes = (4, 8, 2), (0, 2), (2, 6), (3, 2), (4, 2, 8), (0, 8), (0, 8)
    up, _, wide, narrow, down, *_ = (torch.randn(size) for size in sizes)
    stand_ins = StandIns(up, None, wide, narrow, down, None, None)

    assert stand_ins.between(torch.empty(0, 2)).shape == (0, 2)
    assert stand_ins.between(torch.randn(5, 2)).shape == (5, 2)
