"""All experts at once: a batched product over [experts, tokens], the weights as a matrix.

before:  bmm of every token with every expert's weights; activation; bmm; weighed and summed
after:   experts(x, ids, weights, up, down, activation, up_bias, down_bias)

The two products and the activation are matched, what is around them is proven: the weights may be
on the experts' inputs or results, and zero wherever a token did not pick an expert.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from moe_compile.rewrite.expert_bodies import Bodies
from moe_compile.rewrite.proven import ProvenExperts
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.stacked_bodies import batched_bodies


class BatchedExperts(ProvenExperts):
    """Every token through every expert; most of the weights are zero."""

    name = "batched_experts"

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
        """A matrix of weights, zero but for the picks."""
        own, count = weights.gather(1, ids) if full else weights, up.shape[0]
        share = own.new_zeros(x.shape[0], count + 1).scatter_add(1, ids.clamp(max=count), own)
        share = share[:, :count].T.unsqueeze(-1)
        rows = x.expand(up.shape[0], *x.shape)
        rows = torch.bmm(rows * share if weigh_input else rows, up if transposed else up.mT)
        rows = activation(rows if up_bias is None else rows + up_bias.unsqueeze(1))
        rows = torch.bmm(rows, down if transposed else down.mT)
        rows = rows if down_bias is None else rows + down_bias.unsqueeze(1)
        out = (rows if weigh_input else rows * share).sum(0).to(x.dtype)
        beyond = (own * (ids >= count)).sum(1, keepdim=True)
        return out + x * beyond if identity else out

    def bodies(self, graph: fx.Graph) -> Iterator[Bodies | Refuse]:
        """Batched products with stacks."""
        return batched_bodies(graph)
