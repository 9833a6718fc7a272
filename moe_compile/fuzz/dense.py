"""Writes loops without a choice of rows: every expert on every token, or gathered weights."""

from moe_compile.fuzz.calls import (
    FLAT_WEIGHTS,
    every_expert,
    expert_lines,
    picks,
    sum_of_picks,
    without_zero_experts,
)
from moe_compile.fuzz.code import indent
from moe_compile.fuzz.experts import stacked_lines
from moe_compile.fuzz.spec import BlockSpec
from moe_compile.fuzz.storage import Place

_STATES = {
    "expand": "x.unsqueeze(0).expand(self.num_experts, -1, -1)",
    "repeat": "x.repeat(self.num_experts, 1).view(self.num_experts, -1, x.shape[-1])",
    "broadcast": "x.unsqueeze(0)",
}


def _routing(spec: BlockSpec) -> list[str]:
    """The dense matrix of weights, [T, E]."""
    count = spec.experts + spec.zero_experts
    cut = "[:, : self.num_experts]" if spec.zero_experts else ""
    if spec.routing == "one_hot":
        hot = f"F.one_hot(ids, num_classes={count}).to(weights.dtype)"
        return [f"routing = (weights.unsqueeze(-1) * {hot}).sum(dim=1){cut}"]
    empty = f"weights.new_zeros(ids.shape[0], {count})"
    return [f"routing = {empty}.{spec.routing}(1, ids, weights){cut}"]


def dense_output(spec: BlockSpec) -> list[str]:
    """Every expert on every token by batched products; the results are weighted."""
    place = Place("broadcast" if spec.states == "broadcast" else "batched")
    summed = "(rows * routing.t().unsqueeze(-1)).sum(dim=0)"
    if spec.contracted:
        summed = 'torch.einsum("eth,te->th", rows, routing.to(rows.dtype))'
    return [
        *_routing(spec),
        f"states = {_STATES[spec.states]}",
        *stacked_lines(spec, place, "states"),
        f"out = {summed}.to(x.dtype)",
    ]


def dense_input(spec: BlockSpec) -> list[str]:
    """The same with the experts' inputs weighted."""
    return [
        *_routing(spec),
        "states = x.repeat(self.num_experts, 1) * routing.transpose(0, 1).reshape(-1, 1)",
        "states = states.to(x.dtype).view(self.num_experts, -1, x.shape[-1])",
        *stacked_lines(spec, Place("batched"), "states"),
        "out = rows.sum(dim=0)",
    ]


def dense_stack(spec: BlockSpec) -> list[str]:
    """One expert after the other on every token; the stacked results are weighted."""
    summed = f"(rows * routing.unsqueeze(-1)).{sum_of_picks(spec)}"
    if spec.look_alike == "product":
        summed = "(1 + rows * routing.unsqueeze(-1)).prod(dim=1)"
    return [
        *_routing(spec),
        "outputs = []",
        every_expert(spec),
        *indent([*expert_lines(spec, "expert", "x"), "outputs.append(rows)"]),
        "rows = torch.stack(outputs, dim=1)",
        f"out = {summed}.to(x.dtype)",
    ]


def dense_sum(spec: BlockSpec) -> list[str]:
    """The same, summed in the loop."""
    add = "out += " if spec.accumulate == "index_add_" else "out = out + "
    body = [*expert_lines(spec, "expert", "x"), f"{add}rows * routing[:, expert, None]"]
    return [*_routing(spec), "out = torch.zeros_like(x)", every_expert(spec), *indent(body)]


def dense_masked(spec: BlockSpec) -> list[str]:
    """The same, with an expert's weight found by comparison."""
    body = [
        "weight = (weights * (ids == expert)).sum(dim=-1, keepdim=True)",
        *expert_lines(spec, "expert", "x"),
        "out = out + rows * weight",
    ]
    return ["out = torch.zeros_like(x)", every_expert(spec), *indent(body)]


def gather_einsum(spec: BlockSpec) -> list[str]:
    """The weights of the picked experts are gathered for every token."""
    summed = "(rows * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)"
    if spec.contracted:
        summed = 'torch.einsum("tko,tk->to", rows, weights.to(rows.dtype))'
    return [*stacked_lines(spec, Place("einsum", "ids"), "x"), f"out = {summed}"]


def gather_bmm(spec: BlockSpec) -> list[str]:
    """The same for every pick, as batched products."""
    return [
        *without_zero_experts(spec),
        "tokens = torch.arange(x.shape[0], device=x.device)",
        f"tokens = tokens.unsqueeze(1).expand(-1, {spec.top_k}).reshape(-1)",
        "flat_ids = ids.reshape(-1)",
        "picked = x[tokens]",
        *stacked_lines(spec, Place("bmm", "flat_ids"), "picked"),
        f"rows = rows * {FLAT_WEIGHTS}.unsqueeze(-1)",
        f"out = rows.view({picks(spec)}, -1).sum(dim=1).to(x.dtype)",
    ]
