"""Experts by grouped products of rows that are sorted by expert, in any way.

before:  sort the picks; gather tokens; grouped_mm(up); activation; grouped_mm(down); back; weighed
after:   experts(x, ids, weights, up, down, activation, up_bias, down_bias)

`grouped_experts` is transformers' own spelling, matched operation for operation; here the products
are matched and the sorting, the way back and the weights are proven.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from moe_compile.kernels.grouped_mm import grouped_mm
from moe_compile.rewrite.expert_bodies import Bodies
from moe_compile.rewrite.proven import ProvenExperts
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.stacked_bodies import grouped_bodies


class SortedExperts(ProvenExperts):
    """Grouped products of sorted rows, whatever sorts them."""

    name = "sorted_experts"

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
        """Sorted stably; summed by index."""
        picks = ids.reshape(-1)
        order = picks.argsort(stable=True)
        expert = picks[order].clamp(max=up.shape[0] - 1)
        ends = torch.bincount(picks, minlength=up.shape[0])[: up.shape[0]].cumsum(0).int()
        token, own = order // ids.shape[1], weights.gather(1, ids) if full else weights
        here = own.masked_fill(ids >= up.shape[0], 0.0)
        weight = here.reshape(-1)[order].unsqueeze(-1)
        rows = x[token] * weight if weigh_input else x[token]
        rows = grouped_mm(rows, up if transposed else up.mT, ends)
        rows = activation(rows if up_bias is None else rows + up_bias[expert])
        rows = grouped_mm(rows, down if transposed else down.mT, ends)
        rows = rows if down_bias is None else rows + down_bias[expert]
        rows = rows if weigh_input else rows * weight
        out = torch.zeros(x.shape[0], rows.shape[1]).to(x).index_add(0, token, rows.to(x.dtype))
        beyond = (own * (ids >= up.shape[0])).sum(1, keepdim=True)
        return out + x * beyond if identity else out

    def bodies(self, graph: fx.Graph) -> Iterator[Bodies | Refuse]:
        """Grouped products with stacks."""
        return grouped_bodies(graph)
