"""Writes what one expert does to its rows, as lines over stacks or as a module."""

from moe_compile.fuzz.code import method, module_class
from moe_compile.fuzz.spec import BlockSpec
from moe_compile.fuzz.storage import Place, weights

_FUNCTIONS = {
    "silu": ("F.silu({})", "nn.SiLU()"),
    "gelu": ("F.gelu({})", "nn.GELU()"),
    "gelu_tanh": ('F.gelu({}, approximate="tanh")', 'nn.GELU(approximate="tanh")'),
    "relu": ("F.relu({})", "nn.ReLU()"),
    "tanh": ("torch.tanh({})", "nn.Tanh()"),
}
"""Activations as expressions and as modules."""

_CLAMP = ["gate = gate.clamp(max=0.7)", "up = up.clamp(min=-0.7, max=0.7)"]
_NORM = "rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)"
_SCALED_FIRST = (
    "(rows * self.norm_weight)"
    " * torch.rsqrt((rows * self.norm_weight).pow(2).mean(-1, keepdim=True) + 1e-6)"
)


def stacked_lines(spec: BlockSpec, place: Place, x: str) -> list[str]:
    """From `x` to `rows`, with the parameters of stacks."""
    ups, down = weights(spec)
    lines = _activated(spec, [place.product(up, x, first=True) for up in ups])
    shifted = spec.look_alike == "neighbour"
    last = Place("one", f"({place.index} + 1) % self.num_experts") if shifted else place
    lines.append(f"rows = {last.product(down, 'hidden', first=False)}")
    if spec.expert_norm == "own":
        lines.append(f"rows = {_NORM} * {place.slice('norm_weight')}")
    elif spec.expert_norm == "shared":
        lines.append(f"rows = {_SCALED_FIRST}")
    elif spec.expert_norm == "torch":
        lines.append(f"rows = F.rms_norm(rows, ({spec.inner},), self.norm_weight, 1e-6)")
    return lines


def expert_class(spec: BlockSpec, name: str, width: int, *, fused: bool = False) -> list[str]:
    """One expert as a module."""
    inner, bias = spec.inner, f"bias={spec.bias}"
    ups = ["gate_proj", "up_proj"] if spec.gated else ["up_proj"]
    ups, size = (["gate_up_proj"], 2 * width) if fused else (ups, width)
    state = [f"self.{up} = nn.Linear({inner}, {size}, {bias})" for up in ups]
    state.append(f"self.down_proj = nn.Linear({width}, {inner}, {bias})")
    state += activation_state(spec)
    body = _activated(spec, [f"self.{up}(x)" for up in ups])
    if spec.expert_norm == "none":
        body.append("return self.down_proj(hidden)")
    elif spec.expert_norm == "torch":
        state.append(f"self.norm = nn.RMSNorm({inner}, eps=1e-6)")
        body.append("return self.norm(self.down_proj(hidden))")
    else:
        state.append(f"self.norm_weight = nn.Parameter(torch.ones({inner}))")
        body += ["rows = self.down_proj(hidden)", f"return {_NORM} * self.norm_weight"]
    return module_class(name, state, method("forward(self, x)", body))


def _activated(spec: BlockSpec, products: list[str]) -> list[str]:
    """From the up projections to `hidden`."""
    if spec.gated and len(products) == 2:
        lines = [f"gate = {products[0]}", f"up = {products[1]}"]
    elif spec.gated:
        lines = [f"projected = {products[0]}", _halves(spec)]
    else:
        lines = [f"projected = {products[0]}"]
    if spec.look_alike == "mean_subtracted":
        name = "gate" if spec.gated else "projected"
        lines.append(f"{name} = {name} - {name}.mean(dim=0, keepdim=True)")
    lines += _hidden(spec)
    if spec.look_alike == "softmax_over_tokens":
        lines.append("hidden = hidden * F.softmax(hidden, dim=0)")
    return lines


def activation_state(spec: BlockSpec) -> list[str]:
    """The constructor's line of the activation, where it is a module."""
    if not spec.activation_module or _function(spec) not in _FUNCTIONS:
        return []
    return [f"self.act_fn = {_FUNCTIONS[_function(spec)][1]}"]


def _function(spec: BlockSpec) -> str:
    return spec.activation.removesuffix("_glu").removeprefix("clamped_")


def _hidden(spec: BlockSpec) -> list[str]:
    """From `gate` and `up`, or from `projected`, to `hidden`."""
    if spec.activation == "alpha_glu":
        return [*_CLAMP, "hidden = (up + 1) * (gate * torch.sigmoid(gate * 1.702))"]
    if spec.activation == "relu_squared":
        return ["hidden = F.relu(projected).square()"]
    call = "self.act_fn({})" if spec.activation_module else _FUNCTIONS[_function(spec)][0]
    if not spec.gated:
        return [f"hidden = {call.format('projected')}"]
    clamp = _CLAMP if spec.activation.startswith("clamped") else []
    return [*clamp, f"hidden = {call.format('gate')} * up"]


def _halves(spec: BlockSpec) -> str:
    names = "up, gate" if spec.swapped else "gate, up"
    if spec.storage.startswith("interleaved"):
        return f"{names} = projected[..., ::2], projected[..., 1::2]"
    if spec.sliced:
        return f"{names} = projected[..., :{spec.width}], projected[..., {spec.width}:]"
    return f"{names} = projected.chunk(2, dim=-1)"
