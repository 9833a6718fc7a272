"""Experts one after the other, in a loop over all of them, or over those that are hit.

before:  for each expert: its tokens; up, activation, down with its own weights; weighed and added
after:   experts(x, ids, weights, up, down, activation, up_bias, down_bias)

What is matched is each expert's two products, whether its weights are a part of a stack, a slice of
a matrix or parameters of a module of its own. How tokens get there and back is proven instead:
`before` is one of many spellings (index lists, masks, sorting, a matrix of weights).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from moe_compile.rewrite.expert_bodies import Bodies
from moe_compile.rewrite.proven import ProvenExperts
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.unrolled_bodies import unrolled_bodies


class ExpertLoop(ProvenExperts):
    """The loop of model code, unrolled by the trace."""

    name = "expert_loop"

    @staticmethod
    def before(
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        activation: Callable[[Tensor], Tensor],
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        *,
        transposed: bool,
        weigh_input: bool,
        full: bool,
        identity: bool,
    ) -> Tensor:
        """An index list for each expert; `full` weights are those of all choices."""
        out = torch.zeros(x.shape[0], down.shape[2 if transposed else 1], dtype=x.dtype)
        if identity:
            beyond = ids >= up.shape[0]
            own = weights.gather(1, ids) if full else weights
            out = out + x * (own * beyond).sum(1, keepdim=True)
        for expert in range(up.shape[0]):
            token, pick = torch.where(ids == expert)
            weight = weights[token, expert if full else pick, None]
            rows = x[token] * weight if weigh_input else x[token]
            rows = rows @ (up[expert] if transposed else up[expert].T)
            rows = activation(rows if up_bias is None else rows + up_bias[expert])
            rows = rows @ (down[expert] if transposed else down[expert].T)
            rows = rows if down_bias is None else rows + down_bias[expert]
            out = out.index_add(0, token, (rows if weigh_input else rows * weight).to(x.dtype))
        return out

    def bodies(self, graph: fx.Graph) -> Iterator[Bodies | Refuse]:
        """Products with the weights of one expert after the other."""
        return unrolled_bodies(graph)
