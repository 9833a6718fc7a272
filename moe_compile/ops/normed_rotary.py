"""RMSNorm of each head, then its rotary position embedding: of query and key in one op."""

from torch import Tensor

from moe_compile.ops.canonical import canonical
from moe_compile.ops.rms_norm import rms_norm
from moe_compile.ops.rotary import rotary


@canonical
def normed_rotary(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    cast_first: bool = False,
    offset: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    """`rotary(rms_norm(x, weight, eps), cos, sin)`, where both work on the same last dimension.

    Args:
        x: [..., D].
        weight: [D], or None; with `eps`, `cast_first` and `offset` as of `rms_norm`.
        cos: [..., D/2] or [..., D]; with `sin` and `interleaved` as of `rotary`.
        sin: Shaped like cos.
        eps: Added to the mean square.
        cast_first: Round before the scale.
        offset: Added to the weight.
        interleaved: Which elements are a pair.

    Returns:
        [..., D], in halves.
    """
    normed = rms_norm.reference(x, weight, eps, cast_first=cast_first, offset=offset)
    return rotary.reference(normed, cos, sin, interleaved=interleaved)
