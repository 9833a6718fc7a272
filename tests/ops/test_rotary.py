import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

from moe_compile.ops import rotary

DTYPES = [torch.float32, torch.bfloat16]


def angles(last: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.randn(2, 5, last)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def assert_same(got: Tensor, want: Tensor, x: Tensor) -> None:
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    grad = torch.randn_like(want)
    assert torch.equal(
        *(torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (got, want))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_angle_for_each_element(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 8).to(dtype).requires_grad_()
    cos, sin = angles(8, dtype)
    want, _ = qwen.apply_rotary_pos_emb(x, x, cos, sin)
    assert_same(rotary(x, cos[:, None], sin[:, None]), want, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_angle_for_each_pair(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 8).to(dtype).requires_grad_()
    cos, sin = angles(4, dtype)
    want, _ = gpt_oss.apply_rotary_pos_emb(x, x, cos, sin)
    assert_same(rotary(x, cos[:, None], sin[:, None]), want, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_interleaved(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 8).to(dtype).requires_grad_()
    cos, sin = angles(4, dtype)
    twice = (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    want, _ = deepseek.apply_rotary_pos_emb_interleave(x, x, *twice)
    assert_same(rotary(x, cos[:, None], sin[:, None], interleaved=True), want, x)


def test_lengths_are_kept() -> None:
    x = torch.randn(6, 8, dtype=torch.float64)
    angle = torch.randn(6, 4, dtype=torch.float64)
    got = rotary(x, angle.cos(), angle.sin())
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1))
