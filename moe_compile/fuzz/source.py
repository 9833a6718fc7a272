"""Writes the whole source of a block."""

from moe_compile.fuzz.calls import expert_lines
from moe_compile.fuzz.code import method, module_class
from moe_compile.fuzz.experts import activation_state, expert_class
from moe_compile.fuzz.loops import loop_lines
from moe_compile.fuzz.routers import router_lines, router_state
from moe_compile.fuzz.spec import BlockSpec
from moe_compile.fuzz.storage import stacked_state

_IMPORTS = ["import torch", "import torch.nn.functional as F", "from torch import nn"]


def source(spec: BlockSpec) -> str:
    """A module whose class `MoEBlock` maps [B, S, H] to [B, S, H], or to that and the logits."""
    parts = [_IMPORTS]
    if spec.norm_before:
        parts.append(_norm_class(spec))
    if spec.router_module:
        parts.append(_router_class(spec))
    if spec.listed:
        parts.append(expert_class(spec, "ExpertMLP", spec.width, fused=spec.fused))
    if spec.experts_module:
        parts.append(_experts_class(spec))
    if spec.shared != "none":
        parts.append(_shared_class(spec))
    parts.append(_block_class(spec))
    return "\n\n\n".join("\n".join(part) for part in parts) + "\n"


def _norm_class(spec: BlockSpec) -> list[str]:
    body = [
        "dtype = x.dtype",
        "x = x.to(torch.float32)",
        "x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)",
        "return self.weight * x.to(dtype)",
    ]
    state = [f"self.weight = nn.Parameter(torch.ones({spec.hidden}))"]
    return module_class("RMSNorm", state, method("forward(self, x)", body))


def _router_class(spec: BlockSpec) -> list[str]:
    body = [*router_lines(spec), "return logits, weights, ids"]
    return module_class("Router", router_state(spec), method("forward(self, hidden_states)", body))


def _shared_class(spec: BlockSpec) -> list[str]:
    state = [
        f"self.gate_proj = nn.Linear({spec.hidden}, {spec.width}, bias=False)",
        f"self.up_proj = nn.Linear({spec.hidden}, {spec.width}, bias=False)",
        f"self.down_proj = nn.Linear({spec.width}, {spec.hidden}, bias=False)",
    ]
    body = ["return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))"]
    return module_class("SharedExpert", state, method("forward(self, x)", body))


def _experts_class(spec: BlockSpec) -> list[str]:
    forward = method("forward(self, x, weights, ids)", [*_loop(spec), "return out"])
    return module_class("Experts", _experts_state(spec), forward)


def _experts_state(spec: BlockSpec) -> list[str]:
    number = [f"self.num_experts = {spec.experts}"]
    if spec.storage == "module_list":
        made = f"ExpertMLP() for _ in range({spec.experts})"
        return [*number, f"self.experts = nn.ModuleList([{made}])"]
    if spec.storage == "module_dict":
        made = f'{{f"expert_{{i}}": ExpertMLP() for i in range({spec.experts})}}'
        return [*number, f"self.experts = nn.ModuleDict({made})"]
    return [*number, *stacked_state(spec), *activation_state(spec)]


def _loop(spec: BlockSpec) -> list[str]:
    return _expert_choice(spec) if spec.look_alike == "expert_choice" else loop_lines(spec)


def _expert_choice(spec: BlockSpec) -> list[str]:
    """Experts pick two tokens each; `weights` are the scores of all experts."""
    return [
        "picked, tokens = torch.topk(weights.t(), 2, dim=-1)",
        "out = torch.zeros_like(x)",
        "for expert in range(self.num_experts):",
        *(f"    {line}" for line in expert_lines(spec, "expert", "x[tokens[expert]]")),
        "    rows = rows * picked[expert, :, None]",
        "    out = out.index_add(0, tokens[expert], rows)",
    ]


def _block_class(spec: BlockSpec) -> list[str]:
    forward = method("forward(self, hidden_states)", _block_body(spec))
    return module_class("MoEBlock", _block_state(spec), forward)


def _block_state(spec: BlockSpec) -> list[str]:
    lines: list[str] = []
    if spec.norm_before:
        lines.append("self.norm = RMSNorm()")
    lines += ["self.router = Router()"] if spec.router_module else router_state(spec)
    lines += ["self.experts = Experts()"] if spec.experts_module else _experts_state(spec)
    if spec.latent:
        lines.append(f"self.to_latent = nn.Linear({spec.hidden}, {spec.inner}, bias=False)")
        lines.append(f"self.from_latent = nn.Linear({spec.inner}, {spec.hidden}, bias=False)")
    if spec.shared != "none":
        lines.append("self.shared_expert = SharedExpert()")
    if spec.shared == "gated":
        lines.append(f"self.shared_expert_gate = nn.Linear({spec.hidden}, 1, bias=False)")
    return lines


def _block_body(spec: BlockSpec) -> list[str]:
    lines = ["batch, length, width = hidden_states.shape"]
    if spec.residual:
        lines.append("residual = hidden_states")
    if spec.norm_before:
        lines.append("hidden_states = self.norm(hidden_states)")
    lines.append("hidden_states = hidden_states.reshape(-1, width)")
    routed = ["logits, weights, ids = self.router(hidden_states)"]
    lines += routed if spec.router_module else router_lines(spec)
    lines += _adjusted(spec)
    lines.append(f"x = {'self.to_latent(hidden_states)' if spec.latent else 'hidden_states'}")
    lines += ["out = self.experts(x, weights, ids)"] if spec.experts_module else _loop(spec)
    return [*lines, *_after(spec)]


def _adjusted(spec: BlockSpec) -> list[str]:
    """What is done to the routing between the router and the experts."""
    if spec.look_alike == "expert_choice":
        return ["weights = F.softmax(logits, dim=-1).to(hidden_states.dtype)"]
    if spec.look_alike == "capacity":
        return [
            f"chosen = F.one_hot(ids.reshape(-1), {spec.experts})",
            "position = (chosen.cumsum(dim=0) * chosen).sum(dim=-1).view_as(ids)",
            "weights = weights * (position <= 2)",
        ]
    if spec.zero_experts:
        return [
            f"identity = (weights * (ids >= {spec.experts})).sum(dim=-1, keepdim=True)",
        ]
    return []


def _after(spec: BlockSpec) -> list[str]:
    """From the experts' output to the block's."""
    lines: list[str] = []
    if spec.latent:
        lines.append("out = self.from_latent(out)")
    if spec.zero_experts:
        lines.append("out = out + hidden_states * identity.to(hidden_states.dtype)")
    if spec.scale_after != 1.0:
        lines.append(f"out = out * {spec.scale_after}")
    if spec.shared == "plain":
        lines.append("out = out + self.shared_expert(hidden_states)")
    if spec.shared == "gated":
        lines.append("gate = torch.sigmoid(self.shared_expert_gate(hidden_states))")
        lines.append("out = out + gate * self.shared_expert(hidden_states)")
    lines.append("out = out.view(batch, length, width)")
    if spec.residual:
        lines.append("out = residual + out")
    return [*lines, "return out, logits" if spec.logits_out else "return out"]
