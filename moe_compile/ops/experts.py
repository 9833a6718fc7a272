"""The experts of a mixture: a token goes through each of its picks, and the results are summed."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_compile.ops import fp8
from moe_compile.ops.canonical import canonical


@canonical
def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    norm: Callable[..., Tensor] | None = None,
    norm_weight: Tensor | None = None,
    transposed: bool = False,
    weigh_input: bool = False,
    places: Tensor | None = None,
    recipe: fp8.Recipe | None = None,
) -> Tensor:
    """out[t] = sum over picks k of weights[t, k] * expert[ids[t, k]](x[t]).

    An expert is `activation(x @ up.T + up_bias) @ down.T + down_bias`, and `norm` of that.

    Args:
        x: [T, H], the tokens. Those without a pick here may be NaN, and so may their gradients:
            that reaches no other token, and no expert.
        ids: [T, K], the picked experts, each in 0..E-1, or -1 for a pick that lives elsewhere: it
            adds nothing to the output, and its weight's gradient is zero.
        weights: [T, K], the routing weights; their product with the expert's result is in the wider
            of the two dtypes, and so is the sum over picks.
        up: in its dtype the experts compute; [E, N, H], or [E, H, N] when `transposed`.
        down: [E, Hout, I], or [E, I, Hout] when `transposed`.
        activation: Maps [rows, N] to [rows, I] row by row; gating, interleaving and clamping are
            inside it.
        up_bias: [E, N].
        down_bias: [E, Hout].
        norm: maps what the experts give, [rows, Hout], to as much, row by row; where there is a
            `norm_weight` it takes that too: [Hout], or of every row its expert's, [rows, Hout].
        norm_weight: one for all experts, [Hout], or of each, [E, Hout].
        transposed: How up and down are stored.
        weigh_input: Weigh the expert's input, not its result (Llama 4).
        places: [P, 0], from `dispatch`: no more than P of the ids are other than -1.
        recipe: unless it is None, both products, and those of the backward that give gradients of
            rows, are of e4m3 numbers, with scales for each row of an operand (`"current"`), or as
            `fp8_linear` has them (`"blockwise"`). Not exact.

    Returns:
        [T, Hout] in x's dtype. An expert that no token picked has gradients of zero.

    Source: the expert loop of transformers' mixture models, such as `Qwen3MoeExperts`.
    """
    if not transposed:
        up, down = up.mT, down.mT
    sum_dtype = torch.promote_types(x.dtype, weights.dtype)
    out = torch.zeros(x.shape[0], down.shape[-1], dtype=sum_dtype, device=x.device)
    # The gradient of an index of a stack would be as large as the stack, for every expert.
    ups, downs = up.unbind(), down.unbind()
    for expert in range(up.shape[0]):
        pick, token = ids.T.eq(expert).nonzero(as_tuple=True)
        if expert and not len(token):
            continue  # it adds nothing; the first gives all of them gradients
        weight = weights[token, pick, None]
        rows = (x[token] * weight).to(x.dtype) if weigh_input else x[token]
        rows = _product(rows.to(up.dtype), ups[expert], recipe)
        if up_bias is not None:
            rows = rows + up_bias[expert]
        rows = _product(activation(rows).to(down.dtype), downs[expert], recipe)
        if down_bias is not None:
            rows = rows + down_bias[expert]
        rows = normed(rows, norm, _of_expert(norm_weight, expert))
        out = out.index_add(0, token, (rows if weigh_input else rows * weight).to(sum_dtype))
    return out.to(x.dtype)


def normed(rows: Tensor, norm: Callable[..., Tensor] | None, weight: Tensor | None) -> Tensor:
    """What the experts give after their norm; rows as they are where there is none."""
    if norm is None:
        return rows
    return norm(rows) if weight is None else norm(rows, weight)


def _product(rows: Tensor, matrix: Tensor, recipe: fp8.Recipe | None) -> Tensor:
    return rows @ matrix if recipe is None else fp8.expert_product(rows, matrix.mT, recipe)


def _of_expert(norm_weight: Tensor | None, expert: int) -> Tensor | None:
    if norm_weight is None or norm_weight.dim() == 1:
        return norm_weight
    return norm_weight[expert]
