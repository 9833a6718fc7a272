"""Scaled dot product attention with grouped heads, masks, a window and sinks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ops.canonical import canonical, upcast


def band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys], True where query i sees key j: j <= i and i - window < j."""
    lag = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
    return lag >= 0 if window is None else (lag >= 0) & (lag < window)


@canonical
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(query @ key.T * scale + mask) @ value for each head, with the softmax in float32.

    Args:
        query: [B, Hq, S, D].
        key: [B, Hk, L, D]; query head h reads key head h // (Hq / Hk).
        value: [B, Hk, L, Dv].
        mask: Broadcasts to [B, Hq, S, L]; bool (True is seen) or float (added to the logits).
        sinks: [Hq], one more logit a head which takes probability and has no value (gpt-oss).
        scale: Multiplies the logits.
        causal: Query i sees keys j <= i, counted from the top left as in torch's SDPA.
        window: Query i sees keys i - window < j <= i.
        dropout: Probability of dropping a weight; 0.0 outside training.

    Returns:
        [B, Hq, S, Dv] in value's dtype; zero for a query that sees no key.

    Source: Vaswani et al. 2017; order of roundings as in transformers' `eager_attention_forward`.
    """
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    logits = query @ key.mT * scale
    seen = torch.ones((), dtype=torch.bool, device=query.device)
    if causal or window is not None:
        seen = band(query.shape[2], key.shape[2], window, query.device)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        logits = logits + mask
    logits = upcast(logits).masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, sink), dim=-1)
    # A row of -inf alone has the softmax NaN: filled here, and in the backward by the fill above.
    weights = logits.softmax(-1)[..., : key.shape[2]].masked_fill(~seen, 0.0)
    return F.dropout(weights.to(value.dtype), dropout, training=dropout > 0) @ value
