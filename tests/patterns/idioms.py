"""The idioms as models spell them, and small units that contain one of them each."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.rewrite.unit_graph import UnitGraph
from tests.patterns.harness import BATCH, SEQUENCE, Function, normal, unit_of

EPS = 1e-5
SCALE = 0.25
EXPERTS = 4


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normed.to(x.dtype)


def power_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + EPS, -0.5)
    return (normed * weight.float()).type_as(x)


def narrow_norm(x: Tensor, weight: Tensor) -> Tensor:
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + EPS)).to(weight.dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def rotary_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (rotate_half(x) * sin)


def rotary_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE)


def repeat_heads(heads: Tensor, times: int) -> Tensor:
    batch, count, length, width = heads.shape
    wide = heads[:, :, None, :, :].expand(batch, count, times, length, width)
    return wide.reshape(batch, count * times, length, width)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = repeat_heads(key, 2), repeat_heads(value, 2)
    logits = torch.matmul(query, key.transpose(2, 3)) * SCALE + mask
    weights = F.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Function = swiglu,
) -> Tensor:
    """As transformers computes them, sentinels included."""
    expert, order = torch.sort(ids.reshape(-1))
    rows = x[order // ids.size(-1)]
    counts = torch.histc(expert.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    offs = torch.cumsum(counts, dim=0, dtype=torch.int32)
    elsewhere = (expert >= EXPERTS).unsqueeze(-1)
    expert.clamp_(max=EXPERTS - 1)
    rows.masked_fill_(elsewhere, 0.0)
    rows = F.grouped_mm(rows.to(up.dtype), up.transpose(-2, -1), offs=offs)
    rows = activation(rows.masked_fill(elsewhere, 0.0))
    rows = F.grouped_mm(rows.to(down.dtype), down.transpose(-2, -1), offs=offs)
    rows = rows.masked_fill(elsewhere, 0.0) * weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.size(0), device=order.device)
    rows = rows[inverse].view(x.size(0), ids.size(-1), rows.size(-1))
    return rows.sum(dim=1).to(x.dtype)


def norm_unit(function: Function = rms_norm, dtype: torch.dtype = torch.bfloat16) -> UnitGraph:
    return unit_of(function, normal(BATCH, SEQUENCE, 8, dtype=dtype), weight=normal(8, dtype=dtype))


def rotary_unit(function: Function = rotary_half, width: int = 8) -> UnitGraph:
    cos, sin = (normal(BATCH, 1, SEQUENCE, width) for _ in range(2))
    return unit_of(function, normal(BATCH, 4, SEQUENCE, 8), cos, sin)


def attention_unit(
    function: Function = sdpa_attention, heads: int = 4, *, masked: bool = False
) -> UnitGraph:
    key, value = (normal(BATCH, heads, SEQUENCE, 8) for _ in range(2))
    mask = [normal(BATCH, 1, SEQUENCE, SEQUENCE)] if masked else []
    return unit_of(function, normal(BATCH, 4, SEQUENCE, 8), key, value, *mask)


def mlp_unit(function: Function = gated_mlp, **biases: Tensor) -> UnitGraph:
    gate, up, down = normal(6, 8), normal(6, 8), normal(8, 6)
    return unit_of(function, normal(BATCH, SEQUENCE, 8), gate=gate, up=up, down=down, **biases)


def expert_ids(tokens: int = SEQUENCE) -> Tensor:
    return torch.arange(2 * tokens).reshape(tokens, 2) % EXPERTS


def experts_unit(function: Function = grouped_experts, **biases: Tensor) -> UnitGraph:
    tensors = normal(SEQUENCE, 8), expert_ids(), normal(SEQUENCE, 2)
    up, down = normal(EXPERTS, 12, 8), normal(EXPERTS, 8, 6)
    return unit_of(function, *tensors, up=up, down=down, **biases)
