from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

from moe_compile.ops import attention


def heads(queries: int = 5, keys: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 6)]
    return [torch.randn(s).to(dtype) for s in shapes]


def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> Tensor:
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keep = seen[i]
        weights = (k[b, h // 2, keep] @ q[b, h, i] * scale).softmax(-1)
        out[b, h, i] = weights @ v[b, h // 2, keep]
    return out


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 5), (6, 3)])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 2), (False, 9)])
def test_equals_one_query_at_a_time(
    causal: bool, window: int | None, queries: int, keys: int
) -> None:
    q, k, v = heads(queries, keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            past = j <= i and (window is None or i - window < j)
            seen[i, j] = past if causal or window is not None else True
    got = attention(q, k, v, None, None, scale=0.3, causal=causal, window=window)
    torch.testing.assert_close(got, by_hand(q, k, v, 0.3, seen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_exact_with_transformers_eager(dtype: torch.dtype) -> None:
    q, k, v = heads(dtype=dtype)
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), torch.finfo(dtype).min)
    module: Any = SimpleNamespace(num_key_value_groups=2, training=False)
    mask = mask.to(dtype)[None, None]
    want, _ = qwen.eager_attention_forward(module, q, k, v, mask, scaling=0.3)
    assert torch.equal(attention(q, k, v, mask, None, scale=0.3).transpose(1, 2), want)


def test_sinks_equal_gpt_oss() -> None:
    q, k, v = heads()
    module: Any = SimpleNamespace(
        num_key_value_groups=2, training=False, sinks=torch.randn(4, dtype=torch.float64)
    )
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(
        torch.ones(5, 5).triu(1).bool(), -1e300
    )
    want, _ = gpt_oss.eager_attention_forward(module, q, k, v, mask, scaling=0.3)
    got = attention(q, k, v, None, module.sinks, scale=0.3, causal=True)
    torch.testing.assert_close(got.transpose(1, 2), want)


def test_a_query_without_keys_gets_zeros_and_no_nan_gradient() -> None:
    q, k, v = leaves = [t.requires_grad_() for t in heads()]
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    out = attention(q, k, v, mask, None, scale=0.3)
    assert out[:, :, 2].eq(0).all()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][:, :, 2].eq(0).all()


def test_float_and_bool_masks_agree_with_sdpa() -> None:
    q, k, v = heads()
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    mask = torch.rand(2, 1, 5, 5) > 0.4
    mask[..., 0] = True
    bias = torch.randn(5, 5, dtype=torch.float64)
    for m in (mask, bias):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.3)
        torch.testing.assert_close(attention(q, k, v, m, None, scale=0.3), want)


def test_gradcheck() -> None:
    leaves = [t.requires_grad_() for t in heads(3, 3)]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(3, 3, dtype=torch.float64)

    def op(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return attention(q, k, v, mask, sinks, scale=0.3, window=2)

    assert torch.autograd.gradcheck(op, (*leaves, sinks), fast_mode=True)
