"""Experts by grouped GEMMs: tokens sorted by expert, two GEMMs, sorted back, weighted and summed.

before:  sort picks; gather tokens; grouped_mm(up) + bias; activation; grouped_mm(down) + bias;
         weigh; un-sort; sum over picks
after:   experts(x, ids, weights, up, down, activation, up_bias, down_bias)

The match needs the tokens, the expert ids and the routing weights, and nothing of the router.
Gating, interleaving and clamping are inside the captured activation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_compile.kernels.grouped_mm import grouped_mm
from moe_compile.rewrite.pattern import Match, Pattern
from moe_compile.rewrite.refuse import Refuse
from moe_compile.rewrite.region import check_row_wise
from moe_compile.rewrite.weighted_sum import weighted_sum


class GroupedExperts(Pattern):
    """Stacked experts as transformers' `grouped_mm` implementation computes them.

    `sentinels` is its masking of picks with an id beyond the last expert.
    """

    name = "grouped_experts"
    kind = "experts"
    shapes = {
        "x": (6, 8),
        "ids": (6, 2),
        "weights": (6, 2),
        "up": (4, 8, 8),
        "down": (4, 8, 8),
        "activation": (8,),
        "up_bias": (4, 8),
        "down_bias": (4, 8),
    }
    integers = frozenset({"ids"})
    exact = False

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
        sentinels: bool,
    ) -> Tensor:
        """Sort, gather, compute by group, un-sort, sum."""
        count, tokens, picks = up.shape[0], x.shape[0], ids.shape[-1]
        expert, order = torch.sort(ids.reshape(-1))
        offs = _offsets(expert, count)
        elsewhere = (expert >= count).unsqueeze(-1)
        expert = expert.clamp(max=count - 1) if sentinels else expert
        rows = x[order // picks]
        rows = rows.masked_fill(elsewhere, 0.0) if sentinels else rows
        rows = grouped_mm(rows.to(up.dtype), up if transposed else up.transpose(1, 2), offs)
        rows = rows if up_bias is None else rows + up_bias[expert]
        rows = activation(rows.masked_fill(elsewhere, 0.0) if sentinels else rows)
        rows = grouped_mm(rows.to(down.dtype), down if transposed else down.transpose(1, 2), offs)
        rows = rows if down_bias is None else rows + down_bias[expert]
        rows = rows.masked_fill(elsewhere, 0.0) if sentinels else rows
        rows = rows * weights.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        return rows[inverse].view(tokens, picks, rows.shape[-1]).sum(dim=1).to(x.dtype)

    @staticmethod
    def after(
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
        sentinels: bool,
    ) -> Tensor:
        """The canonical op; an id beyond the last expert cannot occur on one device."""
        return weighted_sum(
            x,
            ids,
            weights,
            up,
            down,
            activation,
            up_bias,
            down_bias,
            transposed=transposed,
            weigh_input=False,
            full=False,
            identity=False,
        )

    def applies(self, *, up_bias: bool, down_bias: bool, transposed: bool, sentinels: bool) -> bool:
        """Both GEMMs have a bias, or none has."""
        return up_bias == down_bias

    def check(self, match: Match) -> None:
        """Weights are parameters of one owner, and the activation keeps tokens apart."""
        check_row_wise(match.bindings["activation"])
        for name in ("up", "down"):
            node = match.bindings[name]
            if node.op != "get_attr":
                raise Refuse(f"the {name} weight is computed, not a parameter", node)


def _offsets(expert: Tensor, count: int) -> Tensor:
    """[E] cumulative counts; `histc` takes floats on a CPU and integers on CUDA."""
    counted = expert.float() if expert.device.type == "cpu" else expert.int()
    counts = torch.histc(counted, bins=count, min=0, max=count - 1)
    return torch.cumsum(counts, dim=0, dtype=torch.int32)
