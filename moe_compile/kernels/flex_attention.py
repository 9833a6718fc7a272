"""Attention in flex_attention's kernels: masks, windows and sinks without a mask for every head.

On CUDA, SDPA takes a mask in its oldest kernel only, which wants the heads repeated and visits
every pair; a sink is a mask there, too. Flex reads the mask that there is, skips the blocks in
which nothing is seen, and returns a log-sum-exp that has a gradient, which is all a sink needs.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention, noop_mask

_BLOCK = 128
"""Queries, and keys, of a block: flex's own choice, which the tiles of its kernels divide."""

_WIDTHS = (16, 32, 64, 128, 256)
"""Of a head. `tl.dot` wants 16; others than powers of two would be padded, and are untested."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def is_fused(query: Tensor) -> bool:
    """Whether flex becomes one kernel here: elsewhere it writes out every weight."""
    return query.is_cuda and torch.compiler.is_dynamo_compiling()


def is_flexible(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    dropout: float,
) -> bool:
    """Whether `flexible_attention` takes these arguments of `ops.attention`."""
    # In float32 the kernels would use TF32 or not by other settings than SDPA's.
    is_half = {_dtype(t) for t in (query, key, value)} in ({torch.bfloat16}, {torch.float16})
    has_width = query.shape[-1] in _WIDTHS and value.shape[-1] in _WIDTHS
    is_empty = 0 in (*query.shape, *key.shape)
    if dropout or not is_half or not has_width or is_empty:
        return False
    if mask is None:
        return True
    if causal or window is not None or mask.requires_grad or mask.dim() != 4:
        return False
    # The score_mod indexes with scalars: it cannot broadcast, but for the two cases named there.
    has_batch = mask.shape[0] == 1 or mask.shape[0] == query.shape[0]
    return has_batch and mask.shape[1:] == (1, query.shape[2], key.shape[2])


def flexible_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """`ops.attention`. A float mask needs `sinks`: a query may then see nothing at all."""
    query, key, value = (t.to(_dtype(t)) for t in (query, key, value))
    is_bias = mask is not None and mask.dtype != torch.bool
    attend = partial(
        flex_attention,
        query,
        key,
        value,
        score_mod=_added(mask) if mask is not None and is_bias else None,
        block_mask=block_mask(
            mask, (query.shape[2], key.shape[2]), query.device, causal=causal, window=window
        ),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if sinks is None:
        return attend()
    out, aux = attend(return_aux=AuxRequest(lse=True))
    # A softmax with one more logit, whose weight goes nowhere: the softmax without it, times
    # e^lse / (e^lse + e^sink). Where nothing is seen, lse is -inf, and this and its gradient zero.
    lse = aux.lse
    assert lse is not None
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return (out * share[..., None]).to(out.dtype)


def _dtype(t: Tensor) -> torch.dtype:
    """The dtype in which SDPA would take `t`: no rule of autocast knows flex."""
    device = t.device.type
    is_cast = torch.is_autocast_enabled(device) and t.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else t.dtype


def block_mask(
    mask: Tensor | None,
    lengths: tuple[int, int],
    device: torch.device,
    *,
    causal: bool = False,
    window: int | None = None,
) -> BlockMask | None:
    """The blocks that `mask`, or else `causal` and `window`, leave; None if that is all of them.

    `create_block_mask` evaluates a function at every pair: the band needs arithmetic on blocks
    alone, and a mask that exists is only counted.
    """
    if mask is None and not causal and window is None:
        return None
    if mask is None:
        return _from_blocks(*_band_blocks(*lengths, window, device), _in_band(window), lengths)
    if mask.dtype == torch.bool:
        return _from_blocks(*_mask_blocks(mask), _seen(mask), lengths)
    # What is added hides keys, too: with a sink in the softmax, half of the dtype's range is no
    # weight at all. No second look at the mask is needed, so no block is full.
    some, every = _mask_blocks(mask > torch.finfo(mask.dtype).min / 2)
    return _from_blocks(some | every, None, noop_mask, lengths)


def _added(mask: Tensor) -> ScoreMod:
    """A score_mod that adds mask[B or 1, 1, S, L]; every index of a tensor has to be a tensor."""
    if mask.shape[0] == 1:
        shared = mask[0, 0]
        return lambda score, b, h, i, j: score + shared[i, j]
    own = mask[:, 0]
    return lambda score, b, h, i, j: score + own[b, i, j]


def _seen(mask: Tensor) -> MaskMod:
    """A mask_mod that reads mask[B or 1, 1, S, L], like `_added`."""
    if mask.shape[0] == 1:
        shared = mask[0, 0]
        return lambda b, h, i, j: shared[i, j]
    own = mask[:, 0]
    return lambda b, h, i, j: own[b, i, j]


def _in_band(window: int | None) -> MaskMod:
    """`ops.attention.band` as a mask_mod."""
    if window is None:
        return lambda b, h, i, j: i >= j
    return lambda b, h, i, j: (i >= j) & (i - j < window)


def _band_blocks(
    queries: int, keys: int, window: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[1, 1, blocks, blocks] twice: where some pairs, and where all, are in the band."""
    first_query, last_query = _edges(queries, device)
    first_key, last_key = _edges(keys, device)
    least = first_query[:, None] - last_key
    most = last_query[:, None] - first_key
    some, every = most >= 0, least >= 0
    if window is not None:
        some, every = some & (least < window), every & (most < window)
    # A block that sticks out is not full: torch pads with what is not seen.
    inside = (first_query + _BLOCK <= queries)[:, None] & (first_key + _BLOCK <= keys)
    every = every & inside
    return (some & ~every)[None, None], every[None, None]


def _edges(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last position of each block."""
    first = torch.arange((length + _BLOCK - 1) // _BLOCK, device=device) * _BLOCK
    return first, (first + _BLOCK - 1).clamp(max=length - 1)


def _mask_blocks(seen: Tensor) -> tuple[Tensor, Tensor]:
    """[B or 1, 1, blocks, blocks] twice: where some pairs, and where all, are seen."""
    queries, keys = seen.shape[-2:]
    padded = F.pad(seen, (0, -keys % _BLOCK, 0, -queries % _BLOCK))
    tiles = padded.unflatten(-1, (-1, _BLOCK)).unflatten(-3, (-1, _BLOCK))
    count = tiles.sum((-3, -1), dtype=torch.int32)
    every = count == _BLOCK * _BLOCK
    return (count > 0) & ~every, every


def _from_blocks(
    some: Tensor, every: Tensor | None, mask_mod: MaskMod, lengths: tuple[int, int]
) -> BlockMask:
    keys, queries = _listed(some), _listed(some.mT)
    nothing = (None, None)
    full_keys, full_queries = (
        (nothing, nothing) if every is None else (_listed(every), _listed(every.mT))
    )
    # Not by `from_kv_blocks`: it would make a dense map of the lists, and lists of that.
    return BlockMask(
        lengths, *keys, *full_keys, *queries, *full_queries, (_BLOCK, _BLOCK), mask_mod
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and their indices, which come first."""
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
    # The kernels take the last stride for 1.
    whole = torch.contiguous_format
    count = blocks.sum(-1, dtype=torch.int32)
    return count.contiguous(), indices.to(torch.int32, memory_format=whole)
