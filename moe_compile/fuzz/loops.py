"""Writes how tokens meet their experts: from `x` [L, H], `weights` and `ids` to `out`."""

from collections.abc import Callable

from moe_compile.fuzz.code import indent
from moe_compile.fuzz.experts import stacked_lines
from moe_compile.fuzz.spec import BlockSpec
from moe_compile.fuzz.storage import Place

_FLAT_WEIGHTS = "weights.reshape(-1)"


def loop_lines(spec: BlockSpec) -> list[str]:
    """The whole of the experts' work."""
    return _LOOPS[spec.loop](spec)


def expert_lines(spec: BlockSpec, index: str, x: str) -> list[str]:
    """From `x` to `rows` by the expert of a number."""
    if spec.look_alike == "shared_pairs":
        index = f"{index} // 2"
    if spec.storage == "module_list":
        return [f"rows = self.experts[{index}]({x})"]
    if spec.storage == "module_dict":
        return [f'rows = self.experts[f"expert_{{{index}}}"]({x})']
    return stacked_lines(spec, Place("one", index), x)


def _every(spec: BlockSpec) -> str:
    start = "1, " if spec.look_alike == "skipped" else ""
    return f"for expert in range({start}self.num_experts):"


def _where(spec: BlockSpec) -> list[str]:
    skip = ["if token.numel() == 0:", "    continue"] if spec.skip_empty else []
    body = ["token, pick = torch.where(ids == expert)", *skip, *_picked_rows(spec)]
    return ["out = torch.zeros_like(x)", _every(spec), *indent(body)]


def _hit(spec: BlockSpec) -> list[str]:
    body = ["pick, token = torch.where(expert_mask[expert])", *_picked_rows(spec)]
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
    if spec.in_place:
        return [*lines, "out.index_add_(0, token, rows)"]
    return [*lines, "out[token] += rows" if spec.one_hot else "out = out.index_add(0, token, rows)"]


def _mask(spec: BlockSpec) -> list[str]:
    return [
        f"repeated = x.repeat_interleave({spec.top_k}, dim=0)",
        "flat_ids = ids.view(-1)",
        "y = torch.empty_like(repeated)",
        _every(spec),
        *indent(expert_lines(spec, "expert", "repeated[flat_ids == expert]")),
        "    y[flat_ids == expert] = rows",
        f"y = y.view({_picks(spec)}, -1) * weights.unsqueeze(-1)",
        f"out = y.{_sum_of_picks(spec)}.to(x.dtype)",
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
    zero = spec.zero_experts > 0
    return [
        *(["weights = weights.masked_fill(ids >= self.num_experts, 0.0)"] if zero else []),
        *(["ids = ids.masked_fill(ids >= self.num_experts, 0)"] if zero else []),
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
    weighted = f"rows = rows * {_FLAT_WEIGHTS}[order].unsqueeze(-1)"
    if spec.combine == "index_add":
        width = "torch.zeros_like(x)"
        added = f"index_add(0, order // {spec.top_k}, rows.to(x.dtype))"
        return [weighted, f"out = {width}.{added}"]
    if spec.combine == "argsort":
        unsorted = ["rows = rows[torch.argsort(order)]"]
    elif spec.in_place:
        unsorted = ["y = torch.empty_like(rows)", "y[order] = rows", "rows = y"]
    else:
        unsorted = [
            "inverse = torch.empty_like(order)",
            "inverse[order] = torch.arange(order.shape[0], device=order.device)",
            "rows = rows[inverse]",
        ]
    summed = f"out = rows.view({_picks(spec)}, -1).{_sum_of_picks(spec)}.to(x.dtype)"
    return [weighted, *unsorted, summed]


def _picks(spec: BlockSpec) -> str:
    return f"ids.shape[0], {spec.top_k}"


def _sum_of_picks(spec: BlockSpec) -> str:
    named = {"product": "prod(dim=1)", "maximum": "amax(dim=1)"}
    return named.get(spec.look_alike, "sum(dim=1)")


def _routing(spec: BlockSpec) -> list[str]:
    """The dense matrix of weights, [T, E]."""
    count = spec.experts + spec.zero_experts
    cut = "[:, : self.num_experts]" if spec.zero_experts else ""
    if spec.one_hot:
        hot = f"F.one_hot(ids, num_classes={count}).to(weights.dtype)"
        return [f"routing = (weights.unsqueeze(-1) * {hot}).sum(dim=1){cut}"]
    empty = f"weights.new_zeros(ids.shape[0], {count})"
    scatter = "scatter_" if spec.in_place else "scatter"
    return [f"routing = {empty}.{scatter}(1, ids, weights){cut}"]


def _dense_output(spec: BlockSpec) -> list[str]:
    states = "x.unsqueeze(0).expand(self.num_experts, -1, -1)"
    if spec.skip_empty:
        states = "x.repeat(self.num_experts, 1).view(self.num_experts, -1, x.shape[-1])"
    summed = "(rows * routing.t().unsqueeze(-1)).sum(dim=0)"
    if spec.combine == "argsort":
        summed = 'torch.einsum("eth,te->th", rows, routing.to(rows.dtype))'
    return [
        *_routing(spec),
        f"states = {states}",
        *stacked_lines(spec, Place("batched"), "states"),
        f"out = {summed}.to(x.dtype)",
    ]


def _dense_input(spec: BlockSpec) -> list[str]:
    return [
        *_routing(spec),
        "states = x.repeat(self.num_experts, 1) * routing.transpose(0, 1).reshape(-1, 1)",
        "states = states.to(x.dtype).view(self.num_experts, -1, x.shape[-1])",
        *stacked_lines(spec, Place("batched"), "states"),
        "out = rows.sum(dim=0)",
    ]


def _dense_stack(spec: BlockSpec) -> list[str]:
    summed = f"(rows * routing.unsqueeze(-1)).{_sum_of_picks(spec)}"
    if spec.look_alike == "product":
        summed = "(1 + rows * routing.unsqueeze(-1)).prod(dim=1)"
    return [
        *_routing(spec),
        "outputs = []",
        _every(spec),
        *indent([*expert_lines(spec, "expert", "x"), "outputs.append(rows)"]),
        "rows = torch.stack(outputs, dim=1)",
        f"out = {summed}.to(x.dtype)",
    ]


def _dense_sum(spec: BlockSpec) -> list[str]:
    add = "out += " if spec.in_place else "out = out + "
    body = [*expert_lines(spec, "expert", "x"), f"{add}rows * routing[:, expert, None]"]
    return [*_routing(spec), "out = torch.zeros_like(x)", _every(spec), *indent(body)]


def _dense_masked(spec: BlockSpec) -> list[str]:
    body = [
        "weight = (weights * (ids == expert)).sum(dim=-1, keepdim=True)",
        *expert_lines(spec, "expert", "x"),
        "out = out + rows * weight",
    ]
    return ["out = torch.zeros_like(x)", _every(spec), *indent(body)]


def _gather_einsum(spec: BlockSpec) -> list[str]:
    summed = "(rows * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)"
    if spec.one_hot:
        summed = 'torch.einsum("tko,tk->to", rows, weights.to(rows.dtype))'
    return [*stacked_lines(spec, Place("einsum", "ids"), "x"), f"out = {summed}"]


def _gather_bmm(spec: BlockSpec) -> list[str]:
    zero = spec.zero_experts > 0
    return [
        *(["weights = weights.masked_fill(ids >= self.num_experts, 0.0)"] if zero else []),
        *(["ids = ids.masked_fill(ids >= self.num_experts, 0)"] if zero else []),
        "tokens = torch.arange(x.shape[0], device=x.device)",
        f"tokens = tokens.unsqueeze(1).expand(-1, {spec.top_k}).reshape(-1)",
        "flat_ids = ids.reshape(-1)",
        "picked = x[tokens]",
        *stacked_lines(spec, Place("bmm", "flat_ids"), "picked"),
        f"rows = rows * {_FLAT_WEIGHTS}.unsqueeze(-1)",
        f"out = rows.view({_picks(spec)}, -1).sum(dim=1).to(x.dtype)",
    ]


_LOOPS: dict[str, Callable[[BlockSpec], list[str]]] = {
    "grouped_mm": _grouped,
    "where": _where,
    "hit": _hit,
    "mask": _mask,
    "counts": _counts,
    "counts_numpy": _counts,
    "split": _split,
    "dense_output": _dense_output,
    "dense_input": _dense_input,
    "dense_stack": _dense_stack,
    "dense_sum": _dense_sum,
    "dense_masked": _dense_masked,
    "gather_einsum": _gather_einsum,
    "gather_bmm": _gather_bmm,
}
