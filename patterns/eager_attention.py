"""Attention written out: two matrix products around a softmax, with or without sinks.

before:  softmax(q @ k.T * scale + mask) @ v; with sinks one more logit a head that is dropped again
after:   attention(q, k, v, mask, sinks, scale, dropout)

Rounding differs: the canonical op takes the softmax in float32 and need not form the weights at
all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ops.attention import attention
from moe_compile.patterns.sdpa_attention import repeat_heads
from moe_compile.rewrite.pattern import Pattern


class EagerAttention(Pattern):
    """The `eager` implementation of transformers, and of gpt-oss where there are sinks."""

    name = "eager_attention"
    kind = "attention"
    shapes = {
        "query": (2, 4, 6, 8),
        "key": (2, 1, 6, 8),
        "value": (2, 1, 6, 8),
        "mask": (2, 1, 6, 6),
        "sinks": (4,),
    }
    exact = False

    @staticmethod
    def before(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        *,
        repeated: bool,
    ) -> Tensor:
        """Logits, softmax, weighted sum."""
        if repeated:
            key, value = repeat_heads(key, query), repeat_heads(value, query)
        logits = torch.matmul(query, key.transpose(2, 3)) * scale
        if mask is not None:
            logits = logits + mask
        if sinks is None:
            weights = F.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
            return torch.matmul(weights, value)
        sink = sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
        logits = torch.cat([logits, sink], dim=-1)
        logits = logits - logits.max(dim=-1, keepdim=True).values
        weights = F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]
        return torch.matmul(weights.to(value.dtype), value)

    @staticmethod
    def after(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        *,
        repeated: bool,
    ) -> Tensor:
        """The canonical op."""
        return attention(query, key, value, mask, sinks, scale=scale)
