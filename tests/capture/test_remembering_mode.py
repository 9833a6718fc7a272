"""What is remembered and deduced of fake operators is what torch gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_compile.capture.remembering_mode import RememberingMode

OPERATORS: dict[str, Callable[..., Any]] = {
    "one tensor": torch.sigmoid,
    "a number": lambda x: x.clamp(-1, 1),
    "a number of another kind": lambda x: x.long() * 0.5,
    "a comparison": lambda x: x > 0,
    "two tensors": lambda x: x * x,
    "two dtypes": lambda x: x + x.bfloat16(),
    "a scalar tensor": lambda x: x.bfloat16() * torch.ones((), dtype=torch.float32),
    "a broadcast row": lambda x: x + torch.ones(8),
    "a broadcast column": lambda x: x * torch.ones(x.shape[0], x.shape[1], 1),
    "two broadcasts": lambda x: torch.ones(x.shape[0], 1) + torch.ones(1, 8),
    "a transposed tensor": lambda x: torch.sigmoid(x.transpose(0, 1)),
    "two orders": lambda x: x.transpose(1, 2) + torch.ones(8, x.shape[1]),
    "a half": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "every other": lambda x: x[..., ::2] * x[..., 1::2],
    "a cast": lambda x: x.to(torch.bfloat16),
    "a copy": lambda x: x.transpose(0, 1).clone(),
    "a copy of another layout": lambda x: x.transpose(0, 1).contiguous(),
    "zeros": torch.zeros_like,
    "rows": lambda x: x.view(-1, 8),
    "heads": lambda x: x.view(x.shape[0], x.shape[1], 2, 4),
    "heads of rows": lambda x: x.view(-1, 8).view(x.shape[0], -1, 2, 4).transpose(1, 2),
    "one of many": lambda x: x.permute(2, 0, 1)[-3],
    "each of many": lambda x: x.unbind(-1),
    "a part of a part": lambda x: x.transpose(0, 2)[1:-1][2:5:2],
    "a part that is cut short": lambda x: x[..., -20:30],
    "no part": lambda x: x[..., 6:3],
    "a dimension of one": lambda x: x[..., None, :].squeeze(-2).squeeze(-1),
    "a last dimension of one": lambda x: x.transpose(0, 2).unsqueeze(-1),
    "another order": lambda x: x.permute(1, -1, 0),
    "a matrix on its side": lambda x: x[..., 0].t(),
    "equal parts": lambda x: x.split(3, -1),
    "a product of a part": lambda x: x[..., 3] @ torch.ones(x.shape[1], 2),
    "parts": lambda x: x.split([3, 5], dim=-1),
    "the largest": lambda x: x.max(-1),
    "a product": lambda x: x @ torch.ones(8, 3),
    "a cast in place": lambda x: x.clone().add_(1),
    "a new order in place": lambda x: torch.sigmoid(x.clone().transpose_(0, 1)),
}


def described(mode: FakeTensorMode, function: Callable[..., Any], times: int) -> list[Any]:
    """Sizes, strides, offsets and dtypes of what a function gave for new inputs each time."""
    env = mode.shape_env
    assert env is not None
    with mode:
        sizes = [env.create_unbacked_symint() for _ in range(2)]
        for size in sizes:
            torch._check(size >= 2)
        results = [function(torch.empty(*sizes, 8)) for _ in range(times)]
    named = {str(size): name for size, name in zip(sizes, "bs", strict=True)}
    return [[_form(leaf, named) for leaf in _tensors(result)] for result in results]


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _form(tensor: Tensor, named: dict[str, str]) -> tuple[Any, ...]:
    sizes = str((tuple(tensor.shape), tensor.stride(), tensor.storage_offset()))
    for symbol, name in named.items():
        sizes = sizes.replace(f"Max(1, {symbol})", name).replace(symbol, name)
    return sizes, tensor.dtype, tensor.device


@pytest.mark.parametrize("name", OPERATORS)
def test_forms_are_those_that_torch_gives(name: str) -> None:
    (want,) = described(FakeTensorMode(shape_env=ShapeEnv()), OPERATORS[name], times=1)
    mode = RememberingMode(shape_env=ShapeEnv())
    first, again = described(mode, OPERATORS[name], times=2)
    assert first == want
    assert again == want
    (other,) = described(mode, OPERATORS[name], times=1)  # sizes of other names
    assert other == want


def _run_by_torch(experts: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many operators torch itself runs for a loop over experts."""
    ran = 0
    original: Any = FakeTensorMode.__torch_dispatch__

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        ran += 1
        return original(*args, **kwargs)

    mode = RememberingMode(shape_env=ShapeEnv())
    with mode:
        x, weights = torch.empty(5, 8), torch.empty(experts, 8, 8)
        mask = torch.empty(experts, 5, dtype=torch.bool)
        monkeypatch.setattr(FakeTensorMode, "__torch_dispatch__", counted)
        for expert in range(experts):
            rows = mask[expert].nonzero().unbind(-1)[0]
            gate, up = F.linear(x[rows], weights[expert]).chunk(2, -1)
            x = x.index_add(0, rows, torch.cat([F.silu(gate) * up, up], -1))
    monkeypatch.undo()
    return ran


def test_of_another_expert_torch_is_asked_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, many = _run_by_torch(4, monkeypatch), _run_by_torch(12, monkeypatch)

    assert many == few


def test_numbers_that_are_known_stay_known() -> None:
    with RememberingMode(shape_env=ShapeEnv()):
        for number in (1.0, 2.0):
            assert torch.tensor(number).item() == number


def test_a_size_that_depends_on_data_is_new_each_time() -> None:
    with RememberingMode(shape_env=ShapeEnv()):
        first, second = (torch.nonzero(torch.ones(6)).shape[0] for _ in range(2))
    assert str(first) != str(second)
