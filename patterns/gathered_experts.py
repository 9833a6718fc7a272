"""Every pick with a copy of its own expert's weights, as small models and references have it.

before:  weights of the picked experts gathered; product; activation; product; weighed and summed
after:   experts(x, ids, weights, up, down, activation, up_bias, down_bias)

The two products with gathered stacks (`einsum`, `bmm`, `matmul`) and the activation are matched;
which rows belong to which picks and tokens is proven.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from moe_compile.rewrite.expert_bodies import Bodies
from moe_compile.rewrite.gathered_bodies import gathered_bodies
from moe_compile.rewrite.proven import ProvenExperts
from moe_compile.rewrite.refuse import Refuse


class GatheredExperts(ProvenExperts):
    """Rows that bring their experts' weights along."""

    name = "gathered_experts"

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
        """A copy of two matrices for every pick."""
        own, matrix = weights.gather(1, ids) if full else weights, "tkio" if transposed else "tkoi"
        beyond = ids >= up.shape[0]
        expert, share = ids.masked_fill(beyond, 0), own.masked_fill(beyond, 0.0).unsqueeze(-1)
        rows = (
            x.unsqueeze(1) * share if weigh_input else x.unsqueeze(1).expand(-1, ids.shape[1], -1)
        )
        rows = torch.einsum(f"tki,{matrix}->tko", rows, up[expert])
        rows = activation(rows if up_bias is None else rows + up_bias[expert])
        rows = torch.einsum(f"tki,{matrix}->tko", rows, down[expert])
        rows = rows if down_bias is None else rows + down_bias[expert]
        out = (rows if weigh_input else rows * share).sum(1).to(x.dtype)
        passed = (own * beyond).sum(1, keepdim=True)
        return out + x * passed if identity else out

    def bodies(self, graph: fx.Graph) -> Iterator[Bodies | Refuse]:
        """Products with gathered stacks."""
        return gathered_bodies(graph)
