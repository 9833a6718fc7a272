"""What benchmarks/ops.py times: for each op its inputs, the ways to run it, and its work."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from op_sizes import Sizes
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

from moe_compile import ops
from moe_compile.kernels.activation import register
from moe_compile.kernels.normed_rotary import normed_rotary
from moe_compile.ops.canonical import CanonicalOp
from moe_compile.providers.provider import Call
from moe_compile.providers.registry import choose

Way = Callable[..., Any]
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One op at one size.

    `inputs` go to every way, and those that want a gradient get one. `compiled` are the ways that
    are run compiled, too. `work` is what forward, and forward with backward, must do at least:
    bytes to move (`GB/s`) or floating point operations (`TFLOP/s`). The first way that runs is what
    the others are compared with.
    """

    inputs: tuple[Tensor, ...]
    ways: dict[str, Way]
    compiled: tuple[str, ...]
    unit: str
    work: tuple[float, float]


BOTH = ("hf", "moe_compile")


def lowered(op: CanonicalOp[..., Any], *args: Any, **kwargs: Any) -> Way:
    """The implementation that the library takes for such a call."""
    provider, _ = choose(op, Call(args, kwargs))
    return provider.implementation(op)


def optional(name: str) -> Any:
    """A module, or None where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


def liger(make: Callable[[Any], Way]) -> dict[str, Way]:
    """Liger's way, where it is installed."""
    found = optional("liger_kernel.transformers.functional")
    return {} if found is None else {"liger": make(found)}


def engine(make: Callable[[Any], Way]) -> dict[str, Way]:
    """TransformerEngine's way, where it is installed."""
    found = optional("transformer_engine.pytorch")
    return {} if found is None else {"te": make(found)}


def hf_norm(width: int) -> Way:
    """Transformers' formula."""
    with torch.device("meta"):
        module = hf.Qwen3MoeRMSNorm(width, EPS)
    return lambda x, weight: functional_call(module, {"weight": weight}, (x,))


def our_norm(x: Tensor, weight: Tensor) -> Way:
    """The library's."""
    norm = lowered(ops.rms_norm, x, weight, EPS, cast_first=True)
    return lambda x, weight: norm(x, weight, EPS, cast_first=True)


def te_norm(te: Any, width: int) -> Way:
    """TransformerEngine's."""
    module = te.RMSNorm(width, eps=EPS, params_dtype=torch.bfloat16, device="cuda")
    return lambda x, weight: functional_call(module, {"weight": weight}, (x,))


def rms_norm(sizes: Sizes) -> Case:
    """The norm before attention and experts."""
    x, weight = sizes.draw(sizes.tokens, sizes.hidden), sizes.draw(sizes.hidden)
    ways = {
        "hf": hf_norm(sizes.hidden),
        "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
        "moe_compile": our_norm(x, weight),
        **engine(lambda te: te_norm(te, sizes.hidden)),
        **liger(lambda lg: lambda x, weight: lg.liger_rms_norm(x, weight, EPS, in_place=False)),
    }
    size = 2 * x.numel()
    return Case((x, weight), ways, (*BOTH, "F.rms_norm"), "GB/s", (2 * size, 5 * size))


def add_norm(sizes: Sizes) -> Case:
    """The sum with the residual and its norm; both go on."""
    x, residual = (sizes.draw(sizes.tokens, sizes.hidden) for _ in range(2))
    weight = sizes.draw(sizes.hidden)

    def adding(norm: Way) -> Way:
        def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return norm(total, weight), total

        return run

    ways = {
        "hf": adding(hf_norm(sizes.hidden)),
        "moe_compile": adding(our_norm(x, weight)),
        **engine(lambda te: adding(te_norm(te, sizes.hidden))),
        **liger(
            lambda lg: lambda x, r, w: lg.liger_fused_add_rms_norm(x, r, w, EPS, in_place=False)
        ),
    }
    size = 2 * x.numel()
    return Case((x, residual, weight), ways, BOTH, "GB/s", (4 * size, 8 * size))


def our_rotary(q: Tensor, cos: Tensor, sin: Tensor) -> Way:
    """The library's, of query and key."""
    turn = lowered(ops.rotary, q, cos[:, None], sin[:, None])

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, None], sin[:, None]
        return turn(q, cos, sin), turn(k, cos, sin)

    return run


def rotary(sizes: Sizes) -> Case:
    """Of query and key. Liger's works in place."""
    q, k = sizes.heads_of(sizes.heads), sizes.heads_of(sizes.kv_heads)
    cos, sin = sizes.angles()
    ways = {
        "hf": hf.apply_rotary_pos_emb,
        "moe_compile": our_rotary(q, cos, sin),
        **liger(lambda lg: lg.liger_rope),
    }
    size = 2 * (q.numel() + k.numel())
    return Case((q, k, cos, sin), ways, BOTH, "GB/s", (2 * size, 4 * size))


def our_normed_rotary(
    q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor
) -> Any:
    """The library's: one kernel for each of query and key."""
    angles = cos[:, None], sin[:, None]
    return tuple(
        normed_rotary(x.transpose(1, 2), w, *angles, EPS, cast_first=True)
        for x, w in ((q, wq), (k, wk))
    )


def qk_norm_rotary(sizes: Sizes) -> Case:
    """Norm of every head, then rotary, of query and key, as Qwen3 does."""
    heads = sizes.heads, sizes.kv_heads
    q, k = (sizes.heads_of(n).detach().transpose(1, 2).requires_grad_() for n in heads)
    weights = sizes.draw(sizes.head_dim), sizes.draw(sizes.head_dim)
    cos, sin = sizes.angles()

    def joined(norm: Way, turn: Way) -> Way:
        def run(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> Any:
            return turn(norm(q, wq).transpose(1, 2), norm(k, wk).transpose(1, 2), cos, sin)

        return run

    apart = joined(our_norm(q, weights[0]), our_rotary(q.transpose(1, 2), cos, sin))
    ways = {
        "hf": joined(hf_norm(sizes.head_dim), hf.apply_rotary_pos_emb),
        "moe_compile, two ops": apart,
        "moe_compile": our_normed_rotary,
        **liger(
            lambda lg: joined(
                lambda x, w: lg.liger_rms_norm(x, w, EPS, in_place=False), lg.liger_rope
            )
        ),
    }
    size = 2 * (q.numel() + k.numel())
    compiled = *BOTH, "moe_compile, two ops"
    return Case((q, k, *weights, cos, sin), ways, compiled, "GB/s", (2 * size, 5 * size))


def hf_attention(sizes: Sizes, forward: Way, mask: Tensor | None) -> Way:
    """Transformers' attention, by one of its functions."""
    groups = sizes.heads // sizes.kv_heads
    module: Any = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = forward(module, q, k, v, mask, scaling=sizes.head_dim**-0.5)
        return out.transpose(1, 2)

    return run


def te_attention(te: Any, sizes: Sizes) -> Way:
    """TransformerEngine's."""
    options = {"num_gqa_groups": sizes.kv_heads, "attn_mask_type": "causal", "qkv_format": "bshd"}
    module = te.DotProductAttention(sizes.heads, sizes.head_dim, **options)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = module(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.unflatten(-1, (sizes.heads, sizes.head_dim)).transpose(1, 2)

    return run


def attention(sizes: Sizes) -> Case:
    """Causal, with grouped heads; the FLOPs are of what the mask leaves."""
    q = sizes.heads_of(sizes.heads)
    k, v = (sizes.heads_of(sizes.kv_heads) for _ in range(2))
    scale = {"scale": sizes.head_dim**-0.5}
    ours = lowered(ops.attention, q, k, v, None, None, causal=True, **scale)
    full = torch.full((sizes.length,) * 2, float("-inf"), device=q.device, dtype=q.dtype)
    ways = {
        "hf": hf_attention(sizes, sdpa_attention_forward, None),
        "hf, eager attention": hf_attention(
            sizes, hf.eager_attention_forward, full.triu(1)[None, None]
        ),
        "moe_compile": lambda q, k, v: ours(q, k, v, None, None, causal=True, **scale),
        **engine(lambda te: te_attention(te, sizes)),
    }
    flops = 2 * q.numel() * sizes.length
    compiled = *BOTH, "hf, eager attention"
    return Case((q, k, v), ways, compiled, "TFLOP/s", (flops, 3.5 * flops))


def gated_mlp(sizes: Sizes) -> Case:
    """The dense block of the same config."""
    h, i = sizes.hidden, sizes.intermediate
    gate, up, down = (sizes.draw(*shape, scale=0.02) for shape in ((i, h), (i, h), (h, i)))
    x = sizes.draw(sizes.tokens, h)
    with torch.device("meta"):
        module = hf.Qwen3MoeMLP(sizes.config())
    names = [name for name, _ in module.named_parameters()]
    ours = lowered(ops.gated_mlp, x, gate, up, down, F.silu)
    ways = {
        "hf": lambda x, *w: functional_call(module, dict(zip(names, w, strict=True)), (x,)),
        "moe_compile": lambda x, gate, up, down: ours(x, gate, up, down, F.silu),
        **liger(
            lambda lg: (
                lambda x, gate, up, down: F.linear(
                    lg.liger_swiglu(F.linear(x, gate), F.linear(x, up)), down
                )
            )
        ),
    }
    flops = 6 * sizes.tokens * h * i
    return Case((x, gate, up, down), ways, BOTH, "TFLOP/s", (flops, 3 * flops))


def gated(rows: Tensor) -> Tensor:
    """The activation of an expert."""
    half = rows.shape[1] // 2
    return F.silu(rows[:, :half]) * rows[:, half:]


def liger_experts(_: Any) -> Way:
    """Liger's fused experts."""
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    return lambda x, ids, weights, up, down: function.apply(x, up, down, ids.int(), weights)


def experts(sizes: Sizes) -> Case:
    """The experts without their router; every expert is as likely as any other."""
    x = sizes.draw(sizes.tokens, sizes.hidden)
    up = sizes.draw(sizes.experts, 2 * sizes.width, sizes.hidden, scale=0.02)
    down = sizes.draw(sizes.experts, sizes.hidden, sizes.width, scale=0.02)
    scores = torch.rand(sizes.tokens, sizes.experts, device=x.device)
    ids = scores.topk(sizes.picks).indices
    weights = scores.gather(1, ids).softmax(-1).to(x.dtype).requires_grad_()
    with torch.device("meta"):
        module = hf.Qwen3MoeExperts(sizes.config())
    vars(gated)["key"] = register(make_fx(gated)(torch.ones(3, 2 * sizes.width)).graph)
    ours = lowered(ops.experts, x, ids, weights, up, down, gated)
    ways = {
        "hf": lambda x, ids, weights, up, down: functional_call(
            module, {"gate_up_proj": up, "down_proj": down}, (x, ids, weights)
        ),
        "moe_compile": lambda x, ids, weights, up, down: ours(x, ids, weights, up, down, gated),
        **liger(liger_experts),
    }
    flops = 6 * sizes.tokens * sizes.picks * sizes.hidden * sizes.width
    return Case((x, ids, weights, up, down), ways, BOTH, "TFLOP/s", (flops, 3 * flops))


def linear_cross_entropy(sizes: Sizes) -> Case:
    """The head and the loss."""
    x = sizes.draw(sizes.tokens, sizes.hidden)
    weight = sizes.draw(sizes.vocabulary, sizes.hidden, scale=0.02)
    labels = torch.randint(sizes.vocabulary, (sizes.tokens,), device=x.device)
    ours = lowered(ops.linear_cross_entropy, x, weight, labels)
    ways = {
        "hf": lambda x, weight, labels: F.cross_entropy(F.linear(x, weight).float(), labels),
        "moe_compile": lambda x, weight, labels: ours(x, weight, labels),
        **liger(lambda lg: lg.liger_fused_linear_cross_entropy),
    }
    flops = 2 * sizes.tokens * sizes.hidden * sizes.vocabulary
    return Case((x, weight, labels), ways, BOTH, "TFLOP/s", (flops, 3 * flops))


CASES: dict[str, Callable[[Sizes], Case]] = {
    case.__name__: case
    for case in (
        *(rms_norm, add_norm, rotary, qk_norm_rotary),
        *(attention, gated_mlp, experts, linear_cross_entropy),
    )
}
"""Everything that can be timed, by its name."""
