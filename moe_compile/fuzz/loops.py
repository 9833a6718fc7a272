"""Writes how tokens meet their experts: from `x` [L, H], `weights` and `ids` to `out`."""

from collections.abc import Callable

from moe_compile.fuzz.calls import (
    FLAT_WEIGHTS,
    every_expert,
    expert_lines,
    picks,
    sum_of_picks,
    without_zero_experts,
)
from moe_compile.fuzz.code import indent
from moe_compile.fuzz.dense import (
    dense_input,
    dense_masked,
    dense_output,
    dense_stack,
    dense_sum,
    gather_bmm,
    gather_einsum,
)
from moe_compile.fuzz.experts import stacked_lines
from moe_compile.fuzz.spec import BlockSpec
from moe_compile.fuzz.storage import Place

_ACCUMULATE = {
    "index_add": "out = out.index_add(0, token, rows)",
    "index_add_": "out.index_add_(0, token, rows)",
    "setitem": "out[token] += rows",
}


def loop_lines(spec: BlockSpec) -> list[str]:
    """The whole of the experts' work."""
    return _LOOPS[spec.loop](spec)


def _where(spec: BlockSpec) -> list[str]:
    skip = ["if token.numel() == 0:", "    continue"] if spec.skip_empty else []
    body = ["token, pick = torch.where(ids == expert)", *skip, *_picked_rows(spec)]
    return ["out = torch.zeros_like(x)", every_expert(spec), *indent(body)]


def _hit(spec: BlockSpec) -> list[str]:
    body = ["pick, token = torch.where(expert_mask[expert])", *_picked_rows(spec)]
    if spec.skip_empty:
        body = ["if expert == self.num_experts:", "    continue", *body]
    if spec.look_alike == "skipped":
        body = ["if expert == 0:", "    continue", *body]
    return [
        "out = torch.zeros_like(x)",
        "with torch.no_grad():",
        "    expert_mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)",
        "    expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()",
        "for expert in expert_hit:",
        *indent(["expert = expert[0]", *body]),
    ]


def _picked_rows(spec: BlockSpec) -> list[str]:
    """The rows of one expert, found by `token` and `pick`, added to `out`."""
    lines = [*expert_lines(spec, "expert", "x[token]")]
    if spec.look_alike == "scaled_by_number":
        lines.append("rows = rows * (1 + 0.25 * expert)")
    lines.append("rows = (rows * weights[token, pick, None]).to(x.dtype)")
    if spec.look_alike == "overwritten":
        return [*lines, "out[token] = rows"]
    if spec.look_alike == "sequential":
        return [*lines, "x = x.index_add(0, token, rows)", "out = x"]
    return [*lines, _ACCUMULATE[spec.accumulate]]


def _mask(spec: BlockSpec) -> list[str]:
    return [
        f"repeated = x.repeat_interleave({spec.top_k}, dim=0)",
        "flat_ids = ids.view(-1)",
        "y = torch.empty_like(repeated)",
        every_expert(spec),
        *indent(expert_lines(spec, "expert", "repeated[flat_ids == expert]")),
        "    y[flat_ids == expert] = rows",
        f"y = y.view({picks(spec)}, -1) * weights.unsqueeze(-1)",
        f"out = y.{sum_of_picks(spec)}.to(x.dtype)",
    ]


def _counts(spec: BlockSpec) -> list[str]:
    host = ".cpu().numpy()" if spec.loop == "counts_numpy" else ".tolist()"
    body = ["end = start + int(count)", *_skip(spec)]
    body += expert_lines(spec, "expert", "sorted_tokens[start:end]")
    return [
        "counts = ids.new_zeros((ids.shape[0], self.num_experts)).scatter_(1, ids, 1)",
        f"counts = counts.sum(dim=0){host}",
        "order = ids.reshape(-1).argsort()",
        f"sorted_tokens = x[order // {spec.top_k}]",
        "outputs, start = [], 0",
        "for expert, count in enumerate(counts):",
        *indent([*body, "outputs.append(rows)", "start = end"]),
        "rows = torch.cat(outputs, dim=0)",
        *_combine(spec),
    ]


def _skip(spec: BlockSpec) -> list[str]:
    return ["if count == 0:", "    continue"] if spec.skip_empty else []


def _split(spec: BlockSpec) -> list[str]:
    return [
        "order = torch.argsort(ids.flatten())",
        "counts = torch.bincount(ids.flatten(), minlength=self.num_experts)",
        f"chunks = torch.split(x[order // {spec.top_k}], counts.tolist())",
        "outputs = []",
        "for expert, chunk in enumerate(chunks):",
        *indent([*expert_lines(spec, "expert", "chunk"), "outputs.append(rows)"]),
        "rows = torch.cat(outputs)",
        *_combine(spec),
    ]


def _grouped(spec: BlockSpec) -> list[str]:
    return [
        *without_zero_experts(spec),
        "expert_ids, order = torch.sort(ids.reshape(-1))",
        f"x_sorted = x[order // {spec.top_k}]",
        "counts = torch.histc(",
        "    expert_ids.float(), bins=self.num_experts, min=0, max=self.num_experts - 1",
        ")",
        "offs = torch.cumsum(counts, dim=0, dtype=torch.int32)",
        *stacked_lines(spec, Place("grouped", "expert_ids"), "x_sorted"),
        *_combine(spec),
    ]


def _combine(spec: BlockSpec) -> list[str]:
    """Sorted `rows` back to their tokens, weighted and summed."""
    weighted = f"rows = rows * {FLAT_WEIGHTS}[order].unsqueeze(-1)"
    if spec.combine == "index_add":
        added = f"index_add(0, order // {spec.top_k}, rows.to(x.dtype))"
        return [weighted, f"out = torch.zeros_like(x).{added}"]
    if spec.combine == "argsort":
        unsorted = ["rows = rows[torch.argsort(order)]"]
    elif spec.combine == "scattered":
        unsorted = ["y = torch.empty_like(rows)", "y[order] = rows", "rows = y"]
    else:
        unsorted = [
            "inverse = torch.empty_like(order)",
            "inverse[order] = torch.arange(order.shape[0], device=order.device)",
            "rows = rows[inverse]",
        ]
    summed = f"out = rows.view({picks(spec)}, -1).{sum_of_picks(spec)}.to(x.dtype)"
    return [weighted, *unsorted, summed]


_LOOPS: dict[str, Callable[[BlockSpec], list[str]]] = {
    "grouped_mm": _grouped,
    "where": _where,
    "hit": _hit,
    "mask": _mask,
    "counts": _counts,
    "counts_numpy": _counts,
    "split": _split,
    "dense_output": dense_output,
    "dense_input": dense_input,
    "dense_stack": dense_stack,
    "dense_sum": dense_sum,
    "dense_masked": dense_masked,
    "gather_einsum": gather_einsum,
    "gather_bmm": gather_bmm,
}
