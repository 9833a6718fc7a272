"""Attention through `scaled_dot_product_attention`, with repeated, grouped or equal heads.

before:  sdpa(q, repeat(k), repeat(v), mask, dropout, causal, scale)
after:   attention(q, k, v, mask, scale, causal, dropout)

The canonical op takes the key and value heads as they are, so a provider can leave them unrepeated.
"""

import torch.nn.functional as F
from torch import Tensor

from moe_compile.ops.attention import attention
from moe_compile.rewrite.pattern import Pattern


class SDPAAttention(Pattern):
    """Causal or masked attention; heads may be repeated, grouped by SDPA, or equal in number."""

    name = "sdpa_attention"
    kind = "attention"
    shapes = {
        "query": (2, 4, 6, 8),
        "key": (2, 1, 6, 8),
        "value": (2, 1, 6, 8),
        "mask": (2, 1, 6, 6),
    }
    exact = False

    @staticmethod
    def before(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        dropout: float,
        *,
        causal: bool,
        repeated: bool,
        grouped: bool,
    ) -> Tensor:
        """SDPA as a model calls it."""
        if repeated:
            key, value = repeat_heads(key, query), repeat_heads(value, query)
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped
        )

    @staticmethod
    def after(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        dropout: float,
        *,
        causal: bool,
        repeated: bool,
        grouped: bool,
    ) -> Tensor:
        """The canonical op; whether heads were repeated or grouped is the same to it."""
        return attention(query, key, value, mask, None, scale=scale, causal=causal, dropout=dropout)

    def applies(self, *, mask: bool, causal: bool, repeated: bool, grouped: bool) -> bool:
        """A mask excludes `causal`, repeated heads need no grouping."""
        return not (mask and causal) and not (repeated and grouped)


def repeat_heads(heads: Tensor, query: Tensor) -> Tensor:
    """[B, Hk, L, D] -> [B, Hq, L, D], each head repeated for its group of query heads."""
    batch, count, length, width = heads.shape
    groups = query.shape[1] // count
    wide = heads[:, :, None].expand(batch, count, groups, length, width)
    return wide.reshape(batch, count * groups, length, width)
