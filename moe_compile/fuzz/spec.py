"""What a random block is made of: every choice that its source depends on."""

from dataclasses import dataclass, fields
from typing import Literal

Router = Literal[
    "softmax_topk",
    "topk_softmax",
    "sigmoid",
    "sigmoid_bias",
    "softmax_bias",
    "sqrt_softplus_bias",
    "groups_top2",
    "groups_max",
    "argmax",
    "max",
    "p_norm",
    "scatter_sigmoid",
]
Storage = Literal[
    "stacked",
    "stacked_transposed",
    "interleaved",
    "interleaved_transposed",
    "separate",
    "separate_transposed",
    "flat",
    "module_list",
    "module_dict",
]
Activation = Literal[
    "silu_glu",
    "gelu_glu",
    "gelu_tanh_glu",
    "relu_glu",
    "tanh_glu",
    "clamped_silu_glu",
    "alpha_glu",
    "relu",
    "relu_squared",
    "silu",
    "gelu",
    "tanh",
]
Loop = Literal[
    "grouped_mm",
    "where",
    "hit",
    "mask",
    "counts",
    "counts_numpy",
    "split",
    "dense_output",
    "dense_input",
    "dense_stack",
    "dense_sum",
    "dense_masked",
    "gather_einsum",
    "gather_bmm",
]
LookAlike = Literal[
    "none",
    "expert_choice",
    "capacity",
    "mean_subtracted",
    "softmax_over_tokens",
    "product",
    "maximum",
    "overwritten",
    "sequential",
    "scaled_by_number",
    "neighbour",
    "shared_pairs",
    "skipped",
    "unpicked_bias",
]


ExpertNorm = Literal["none", "own", "shared", "torch"]


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One block, from which its source follows.

    Attributes:
        seed: what it was drawn from.
        experts, top_k, hidden, width: E, K, H and I.
        groups: of experts, where the router picks groups first; half of them are picked.
        router: how ids and weights follow from the logits.
        router_module: the router is a module of its own, not lines of the block.
        router_linear: its projection is an `nn.Linear`, not a parameter.
        router_bias: the projection has a bias.
        router_float32: logits are computed in float32.
        group_fill: what the scores of groups that were not picked become.
        normalized: weights are divided by their sum; in place, or beside a tiny number.
        scaling: a factor of the routing weights.
        storage: how the experts' parameters are stored.
        bias: the experts have biases.
        activation: of the experts.
        activation_module: it is a module such as `nn.SiLU`, where there is one.
        swapped: the second half of the up projection is the gate.
        sliced: halves are taken by slices, not by `chunk`.
        fused: an expert of a list has one up projection for gate and up.
        experts_module: the experts are a module of their own, not parameters of the block.
        loop: how tokens meet their experts.
        skip_empty: the loop passes over experts that no token picked, or could pick.
        accumulate: how a loop adds an expert's rows to the output.
        combine: how sorted rows come back to their tokens.
        routing: how the dense routing matrix is made.
        contracted: weighting and summing is one `einsum`.
        states: how every expert gets every token.
        enumerated: a loop over a list of experts is over the list, not over numbers.
        weights_early: weights have the tokens' dtype before the experts.
        shared: a shared expert beside the routed ones.
        scale_after: a factor of the experts' output.
        norm_before, residual, latent: parts around the experts.
        expert_norm: after each expert: each its own, one of all, or torch's (own for modules).
        zero_experts: how many experts are the identity.
        logits_out: the block returns its logits, too.
        look_alike: what makes it no mixture of experts, or "none".
    """

    seed: int
    experts: int
    top_k: int
    hidden: int
    width: int
    groups: int = 1
    router: Router = "softmax_topk"
    router_module: bool = True
    router_linear: bool = False
    router_bias: bool = False
    router_float32: bool = True
    group_fill: Literal["0.0", '-float("inf")'] = "0.0"
    normalized: Literal["no", "plain", "in_place", "epsilon"] = "no"
    scaling: float = 1.0
    storage: Storage = "stacked"
    bias: bool = False
    activation: Activation = "silu_glu"
    activation_module: bool = False
    swapped: bool = False
    sliced: bool = False
    fused: bool = False
    experts_module: bool = True
    loop: Loop = "grouped_mm"
    skip_empty: bool = False
    accumulate: Literal["index_add", "index_add_", "setitem"] = "index_add"
    combine: Literal["inverse", "scattered", "argsort", "index_add"] = "inverse"
    routing: Literal["scatter", "scatter_", "one_hot"] = "scatter"
    contracted: bool = False
    states: Literal["expand", "repeat", "broadcast"] = "expand"
    enumerated: bool = False
    weights_early: bool = True
    shared: Literal["none", "plain", "gated"] = "none"
    scale_after: float = 1.0
    norm_before: bool = False
    residual: bool = False
    latent: bool = False
    expert_norm: ExpertNorm = "none"
    zero_experts: int = 0
    logits_out: bool = False
    look_alike: LookAlike = "none"

    @property
    def gated(self) -> bool:
        """The activation is of two halves."""
        return self.activation.endswith("_glu")

    @property
    def listed(self) -> bool:
        """Each expert is a module."""
        return self.storage in ("module_list", "module_dict")

    @property
    def inner(self) -> int:
        """The width of the tokens that the experts see."""
        return self.hidden // 2 if self.latent else self.hidden

    def __str__(self) -> str:
        """Every choice that differs from the default."""
        named = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        return ", ".join(f"{name}={value}" for name, value, default in named if value != default)


def unsupported(spec: BlockSpec) -> str | None:
    """Why the canonical experts cannot say what the block computes; None where they can.

    These blocks must be refused, or be right; they do not count towards the share of proofs.
    """
    if spec.look_alike != "none":
        return f"a look-alike: {spec.look_alike}"
    return None
