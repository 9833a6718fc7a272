from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from moe_compile.ops import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module_class", "options"),
    [
        (Qwen3MoeRMSNorm, {"cast_first": True}),
        (GptOssRMSNorm, {}),
        (Qwen3NextRMSNorm, {"offset": 1.0}),
    ],
)
def test_bit_exact_with_transformers(
    module_class: Any, options: dict[str, Any], weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    module = module_class(32, eps=1e-5).to(weight_dtype)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(2, 5, 32).to(dtype).requires_grad_()

    def op(x: Tensor) -> Tensor:
        return rms_norm(x, module.weight, 1e-5, **options)

    want, got = module(x), op(x)
    grad = torch.randn_like(want)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    leaves = (x, module.weight)
    grads = zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    )
    assert all(torch.equal(a, b) for a, b in grads)


def test_no_weight() -> None:
    x = torch.randn(4, 8).bfloat16()
    assert torch.equal(rms_norm(x, None, 1e-6), rms_norm(x, torch.ones(8).bfloat16(), 1e-6))


@pytest.mark.parametrize("cast_first", [False, True])
def test_float64_stays_float64(cast_first: bool) -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)
    got = rms_norm(x, weight, 1e-6, cast_first=cast_first, offset=1.0)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_gradcheck() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, offset=1.0), (x, weight))
