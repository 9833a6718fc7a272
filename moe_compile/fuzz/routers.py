"""Writes routers: from `hidden_states` [T, H] to `logits`, `weights` and `ids` [T, K]."""

from moe_compile.fuzz.spec import BlockSpec

_SIGMOID = ("sigmoid", "sigmoid_bias", "groups_top2", "groups_max")
_CORRECTED = ("sigmoid_bias", "softmax_bias", "sqrt_softplus_bias", "groups_top2")
_NORMALIZED = {
    "plain": "weights = weights / weights.sum(dim=-1, keepdim=True)",
    "in_place": "weights /= weights.sum(dim=-1, keepdim=True)",
    "epsilon": "weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)",
}


def router_state(spec: BlockSpec) -> list[str]:
    """The constructor's lines."""
    count = spec.experts + spec.zero_experts
    lines: list[str] = []
    if spec.router_linear:
        lines.append(f"self.gate = nn.Linear({spec.hidden}, {count}, bias={spec.router_bias})")
    else:
        lines.append(f"self.weight = nn.Parameter(torch.empty({count}, {spec.hidden}))")
        if spec.router_bias:
            lines.append(f"self.bias = nn.Parameter(torch.empty({count}))")
    if spec.router in _CORRECTED:
        lines.append(f'self.register_buffer("correction_bias", torch.zeros({count}))')
    return lines


def router_lines(spec: BlockSpec) -> list[str]:
    """The lines that pick the experts."""
    lines = [_logits(spec), *_picks(spec)]
    if spec.router == "p_norm":
        lines.append("weights = weights / torch.norm(weights, p=2, dim=-1, keepdim=True)")
    if spec.normalized != "no":
        lines.append(_NORMALIZED[spec.normalized])
    if spec.scaling != 1.0:
        lines.append(f"weights = weights * {spec.scaling}")
    if spec.weights_early:
        lines.append("weights = weights.to(hidden_states.dtype)")
    return lines


def _logits(spec: BlockSpec) -> str:
    x = "hidden_states"
    if spec.router_linear:
        cast = ".float()" if spec.router_float32 else ""
        return f"logits = self.gate({x}){cast}"
    cast = ".type(torch.float32)" if spec.router_float32 else ""
    bias = f", self.bias{cast}" if spec.router_bias else ""
    return f"logits = F.linear({x}{cast}, self.weight{cast}{bias})"


def _picks(spec: BlockSpec) -> list[str]:
    k = spec.top_k
    if spec.router == "topk_softmax":
        dtype = ", dtype=torch.float32" if spec.router_float32 else ""
        return [
            f"picked, ids = torch.topk(logits, {k}, dim=-1)",
            f"weights = F.softmax(picked, dim=-1{dtype})",
        ]
    if spec.router == "scatter_sigmoid":
        return [
            f"picked, ids = torch.topk(logits, {k}, dim=1)",
            'scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, picked)',
            "weights = torch.sigmoid(scores).gather(1, ids)",
        ]
    lines = [_scores(spec)]
    if spec.router == "max":
        return [*lines, "weights, ids = torch.max(scores, dim=-1, keepdim=True)"]
    if spec.router == "argmax":
        lines.append("ids = torch.argmax(scores, dim=-1, keepdim=True)")
        return [*lines, "weights = scores.gather(1, ids)"]
    if spec.router in ("softmax_topk", "sigmoid", "p_norm"):
        return [*lines, f"weights, ids = torch.topk(scores, {k}, dim=-1)"]
    lines += _choice(spec)
    lines.append(f"ids = torch.topk(choice, k={k}, dim=-1, sorted=False)[1]")
    return [*lines, "weights = scores.gather(1, ids)"]


def _scores(spec: BlockSpec) -> str:
    if spec.router in _SIGMOID:
        return "scores = logits.sigmoid()"
    if spec.router == "sqrt_softplus_bias":
        return "scores = F.softplus(logits).sqrt()"
    dtype = ", dtype=torch.float32" if spec.router_float32 else ""
    return f"scores = F.softmax(logits, dim=-1{dtype})"


def _choice(spec: BlockSpec) -> list[str]:
    bias = " + self.correction_bias" if spec.router in _CORRECTED else ""
    if not spec.router.startswith("groups"):
        return [f"choice = scores{bias}"]
    size = spec.experts // spec.groups
    best = "amax(dim=-1)" if spec.router == "groups_max" else "topk(2, dim=-1)[0].sum(dim=-1)"
    return [
        f"choice = scores{bias}",
        f"group_scores = choice.view(-1, {spec.groups}, {size}).{best}",
        f"group_ids = torch.topk(group_scores, k={spec.groups // 2}, dim=-1, sorted=False)[1]",
        "group_mask = torch.zeros_like(group_scores).scatter_(1, group_ids, 1)",
        f"mask = group_mask.unsqueeze(-1).expand(-1, {spec.groups}, {size})",
        f"mask = mask.reshape(-1, {spec.experts}).bool()",
        f"choice = choice.masked_fill(~mask, {spec.group_fill})",
    ]
