# pyright: basic

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_compile.verify import oracle
from moe_compile.verify.oracle import Disproved, prove

T, H, W, E, K = 12, 8, 6, 4, 2
Function = Callable[..., Any]


def normal(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, dtype=torch.float64, generator=generator)


# The experts: a loop as in a model file, and a sort with grouped GEMMs.


def loop(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    weights, ids = logits.softmax(-1).topk(K)
    weights = weights / weights.sum(-1, keepdim=True)
    mask = F.one_hot(ids, E).permute(2, 1, 0)
    out = torch.zeros_like(x)
    for expert in (mask.sum((-1, -2)) > 0).nonzero():
        k, token = torch.where(mask[expert[0]])
        gate, up = (x[token] @ gate_up[expert[0]]).chunk(2, -1)
        y = (F.silu(gate) * up) @ down[expert[0]]
        out.index_add_(0, token, y * weights[token, k, None])
    return out


def grouped(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, bug: str = "") -> Tensor:
    top, ids = logits.topk(K)
    weights = top.softmax(-1)  # the softmax of the top logits is the normalised top of the softmax
    order = ids.flatten().argsort(stable=True)
    token = order % T if bug == "wrong token" else order // K
    offs = torch.bincount(ids.flatten(), minlength=E).cumsum(0).int()
    if bug == "last row dropped":
        offs[-1] -= 1
    if bug == "last expert off by one":
        gate_up, down = (torch.cat([w[:-1], w[-2:-1]]) for w in (gate_up, down))
    weight = weights.flatten() if bug == "weights unsorted" else weights.flatten()[order]
    weight = weight.detach() if bug == "dropped router gradient" else weight
    xs = x[token] * weight[:, None] if bug == "weight before activation" else x[token]
    gate, up = F.grouped_mm(xs, gate_up, offs=offs).chunk(2, -1)
    if bug == "gate and up swapped":
        gate, up = up, gate
    h = gate.sigmoid() * gate * (up.detach() if bug == "dropped gradient" else up)
    ys = F.grouped_mm(h, down, offs=offs)
    ys = ys if bug == "weight before activation" else ys * weight[:, None]
    if bug == "overwrite instead of add":
        return torch.zeros_like(x).index_copy(0, token, ys)
    return torch.zeros_like(x).index_add(0, token, ys)


EXPERTS = normal(T, H), normal(T, E), normal(E, H, 2 * W), normal(E, W, H)


def test_sorted_grouped_experts_are_the_loop():
    prove(loop, grouped, EXPERTS)


@pytest.mark.parametrize(
    "bug",
    [
        "wrong token",
        "last row dropped",
        "weights unsorted",
        "gate and up swapped",
        "last expert off by one",
        "weight before activation",
        "overwrite instead of add",
    ],
)
def test_a_wrong_rewrite_of_the_experts_is_disproved(bug: str):
    with pytest.raises(Disproved, match=r"^output 0 differs in \d+ of 96 elements"):
        prove(loop, partial(grouped, bug=bug), EXPERTS)


@pytest.mark.parametrize("bug", ["dropped gradient", "dropped router gradient"])
def test_a_dropped_gradient_is_disproved_though_the_outputs_are_equal(bug: str):
    with pytest.raises(Disproved, match=r"^the gradient of input"):
        prove(loop, partial(grouped, bug=bug), EXPERTS)


def test_a_disproof_says_what_differs_and_in_how_many_elements():
    def after(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, torch.cat([x[:1] * y[:1], x[1:] * y[1:].detach()])

    with pytest.raises(Disproved) as error:
        prove(lambda x, y: (x + y, x * y), after, (normal(3, 2), normal(3, 2)))
    assert str(error.value) == "the gradient of input 1 differs in 4 of 6 elements"


def test_shapes_and_the_number_of_outputs_count():
    with pytest.raises(Disproved, match=r"output 0 has shape \(2, 3\) instead of \(3, 2\)"):
        prove(lambda x: x, lambda x: x.t(), (normal(3, 2),))
    with pytest.raises(Disproved, match="2 outputs and gradients become 3"):
        prove(lambda x: x, lambda x: (x, x), (normal(3, 2),))


def test_integer_outputs_count():
    prove(lambda x: x.argsort(0), lambda x: x.sort(0).indices, (normal(5),))
    with pytest.raises(Disproved, match="output 0 differs in"):
        prove(lambda x: x.argsort(0), lambda x: (-x).argsort(0), (normal(5),))


# Attention.

QKV = normal(1, 4, 5, 4), normal(1, 2, 5, 4), normal(1, 2, 5, 4)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float = 0.5) -> Tensor:
    k, v = (x[:, :, None].expand(1, 2, 2, 5, 4).reshape(1, 4, 5, 4) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale + mask
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return F.softmax(scores, dim=-1, dtype=torch.float64) @ v


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(
        ~mask, torch.finfo(torch.float64).min
    )


def causal_eager(*qkv: Tensor) -> Tensor:
    return eager(*qkv, mask=additive(CAUSAL))


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"attn_mask": CAUSAL}, {"attn_mask": additive(CAUSAL)}]
)
def test_eager_attention_is_sdpa(options: dict[str, Any]):
    prove(
        causal_eager,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options),
        QKV,
    )


def test_the_overload_of_sdpa_is_known_too():
    q = normal(1, 4, 5, 4)
    prove(
        lambda q: torch.ops.aten.scaled_dot_product_attention.default(q, q, q),
        lambda q: F.scaled_dot_product_attention(q, q, q),
        (q,),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": CAUSAL.roll(1, 1)},
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(-1)},
        {},
        {"is_causal": True, "scale": 1.0},
        {"is_causal": True, "scale": 0.5 + 1e-15},
    ],
)
def test_a_wrong_mask_or_scale_is_disproved(options: dict[str, Any]):
    with pytest.raises(Disproved):
        prove(
            causal_eager,
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options),
            QKV,
        )


def test_heads_grouped_in_another_order_are_disproved():
    with pytest.raises(Disproved):
        prove(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            lambda q, k, v: F.scaled_dot_product_attention(
                q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
            ),
            QKV,
        )


def sinks_by_cat(scores: Tensor, sinks: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([scores, sinks[:, None, None].expand(2, 3, 1)], dim=-1)
    return F.softmax(scores - scores.max(-1, keepdim=True).values, dim=-1)[..., :-1] @ v


def sinks_by_sum(scores: Tensor, sinks: Tensor, v: Tensor, keep: float = 1.0) -> Tensor:
    sinks = sinks[:, None, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    exp = (scores - top).exp()
    return exp @ v / (exp.sum(-1, keepdim=True) + keep * (sinks - top).exp())


def test_attention_sinks():
    inputs = normal(2, 3, 5), normal(2) * 2, normal(2, 5, 4)
    prove(sinks_by_cat, sinks_by_sum, inputs)
    with pytest.raises(Disproved):
        prove(sinks_by_cat, lambda *x: sinks_by_sum(*x, keep=0.0), inputs)


# Small equalities, each with a wrong variant.

X, Y, MATRIX = normal(6, 4), normal(6, 4) + 1e-3, normal(4, 4)
EPS = 1e-6


def swiglu_of_cat(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    gate, up = F.linear(x, torch.cat([w_gate, w_up])).chunk(2, -1)
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def layer_norm(x: Tensor, w: Tensor, correction: int = 0) -> Tensor:
    variance = x.var(-1, correction=correction, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (variance + EPS).sqrt() * w + w


def clamped_glu(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=1.0), x[..., 1::2].clamp(min=-1.0, max=1.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def clamped_glu_by_reshape(x: Tensor, limit: float = 1.0) -> Tensor:
    gate, up = x.view(6, 2, 2).unbind(-1)
    gate = torch.minimum(gate, torch.full_like(gate, limit))
    up = torch.where(up.abs() > 1, up.sign(), up)
    return gate / (1 + (-1.702 * gate).exp()) * up + gate * F.sigmoid(1.702 * gate)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    angles = torch.cat((angle, angle), dim=-1)
    half = torch.cat((-x[..., 2:], x[..., :2]), dim=-1)
    return x * angles.cos() + half * angles.sin()


def rotate_by_parts(x: Tensor, angle: Tensor, sign: int = 1) -> Tensor:
    a, b = x.split(2, -1)
    cos, sin = angle.cos(), angle.sin() * sign
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def written_in_place(x: Tensor, row: int = 3) -> Tensor:
    out = torch.zeros(6, 4, dtype=torch.float64)
    out[:, :2] = x[:, 2:]
    view = out.view(2, 3, 4)
    view[1, 0].add_(x[row]).mul_(2)
    out[x > 1] = 0.5
    return out


def written_functionally(x: Tensor) -> Tensor:
    out = torch.cat([x[:, 2:], torch.zeros_like(x[:, 2:])], 1)
    out = torch.stack([*out[:3], (out[3] + x[3]) * 2, *out[4:]])
    return torch.where(x > 1, 0.5, out)


def balance_loss(logits: Tensor, experts: int = 4) -> Tensor:
    probs, ids = logits.softmax(-1), logits.topk(2).indices
    return experts * (F.one_hot(ids, 4).float().mean((0, 1)) * probs.mean(0)).sum()


def balance_loss_by_counts(logits: Tensor) -> Tensor:
    ids = logits.topk(2).indices
    counts = torch.histc(ids.float(), bins=4, min=0, max=3).double()
    return (counts * logits.softmax(-1)).sum() * 4 / (ids.numel() * logits.shape[0])


LABELS = torch.tensor([0, 3, -100, 1, 2, 2])


def loss_by_hand(x: Tensor, count: int = 5) -> Tensor:
    kept = LABELS != -100
    picked = x.gather(-1, LABELS.clamp(min=0)[:, None])[:, 0]
    return ((x.logsumexp(-1) - picked) * kept).sum() / count


EQUALITIES: dict[str, tuple[Function, Function, Function, Sequence[Tensor]]] = {
    "silu and chunk": (
        lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        lambda x: x[..., :2] / (1 + torch.exp(-x[..., :2])) * x[..., 2:],
        lambda x: F.silu(x[..., 2:]) * x[..., :2],
        (X,),
    ),
    "interleaved gate and up, clamped": (
        clamped_glu,
        clamped_glu_by_reshape,
        lambda x: clamped_glu_by_reshape(x, limit=2.0),
        (X,),
    ),
    "fused projections": (
        lambda x, w: F.silu(F.linear(x, w)) * F.linear(x, w.t()),
        lambda x, w: swiglu_of_cat(x, w, w.t()),
        lambda x, w: swiglu_of_cat(x, w.t(), w),
        (X, MATRIX),
    ),
    "rms norm": (
        rms_norm,
        lambda x, w: x / torch.sqrt((x * x).sum(-1, keepdim=True) / 4 + EPS) * w,
        lambda x, w: rms_norm(x, w, 1e-5),
        (X, normal(4)),
    ),
    "fused rms norm": (
        rms_norm,
        lambda x, w: F.rms_norm(x, (4,), w, EPS),
        lambda x, w: F.rms_norm(x, (4,), w + 1, EPS),
        (X, normal(4)),
    ),
    "rms norm by a half power": (
        rms_norm,
        lambda x, w: w * x * (x.square().mean(-1, keepdim=True) + EPS) ** -0.5,
        lambda x, w: w * x * (x.square().mean(-1, keepdim=True) + EPS) ** -1.5,
        (X, normal(4)),
    ),
    "layer norm": (
        lambda x, w: F.layer_norm(x, (4,), w, w, EPS),
        layer_norm,
        lambda x, w: layer_norm(x, w, correction=1),
        (X, normal(4)),
    ),
    "rope": (
        rotate,
        rotate_by_parts,
        lambda x, angle: rotate_by_parts(x, angle, -1),
        (X, normal(6, 2)),
    ),
    "normalize": (
        lambda x: F.normalize(x, p=2, dim=-1),
        lambda x: x / (x * x).sum(-1, keepdim=True).sqrt(),
        lambda x: x / x.abs().sum(-1, keepdim=True),
        (X,),
    ),
    "softmax by its definition": (
        lambda x: x.softmax(0),
        lambda x: (x - x.amax(0)).exp() / (x - x.amax(0)).exp().sum(0),
        lambda x: (x - x.amax(0)).exp() / (x - x.amax(0)).exp().mean(0),
        (X,),
    ),
    "cross entropy": (
        lambda x: F.cross_entropy(x, LABELS),
        loss_by_hand,
        lambda x: loss_by_hand(x, count=6),
        (X,),
    ),
    "z loss": (
        lambda x: torch.logsumexp(x, -1).square().mean(),
        lambda x: (x - x.log_softmax(-1))[:, 0].pow(2).mean(),
        lambda x: (x - x.log_softmax(-1))[:, 0].mean(),
        (X,),
    ),
    "balance loss": (
        balance_loss,
        balance_loss_by_counts,
        lambda x: balance_loss(x, 3),
        (X,),
    ),
    "softplus and its inverse scale": (
        lambda x: F.softplus(x).sqrt() * (1 / 3),
        lambda x: (1 + x.exp()).log() ** 0.5 / 3,
        lambda x: (1 + x.exp()).log() / 3,
        (X,),
    ),
    "gelu": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3)))),
        lambda x: F.gelu(x),
        (X,),
    ),
    "squared relu": (
        lambda x: F.relu(x).square(),
        lambda x: x.masked_fill(x < 0, 0) * x.clamp(min=0),
        lambda x: x.abs() * x.clamp(min=0) + x.square(),
        (X,),
    ),
    "writes in place": (
        written_in_place,
        written_functionally,
        lambda x: written_in_place(x, row=2),
        (X,),
    ),
    "sort and top-k": (
        lambda x: x.sort(-1, descending=True).values[:, :2],
        lambda x: x.topk(2).values,
        lambda x: x.topk(2, largest=False).values,
        (X,),
    ),
    "uninitialised memory": (
        lambda x: torch.empty_like(x).copy_(x),
        lambda x: x * 1,
        lambda x: torch.cat([x[:5], torch.empty_like(x[5:])]),
        (X,),
    ),
}


@pytest.mark.parametrize("name", EQUALITIES)
def test_equality(name: str):
    before, after, wrong, inputs = EQUALITIES[name]
    prove(before, after, inputs)
    with pytest.raises(Disproved):
        prove(before, wrong, inputs)


# Operators that are not known, and how to make them known.


def test_an_unknown_operator_is_named():
    for function in (lambda x: x.prod(0), lambda x: F.dropout(x), lambda x: x // 2, torch.lgamma):
        with pytest.raises(NotImplementedError, match="the oracle does not know aten"):
            prove(function, function, (X,))
    with pytest.raises(NotImplementedError, match="view_as_complex"):
        prove(lambda x: torch.view_as_complex(x.view(6, 2, 2)).abs(), torch.abs, (X,))


@torch.library.custom_op("oracle_test::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    raise AssertionError("a kernel for another device")


@torch.library.custom_op("oracle_test::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("a kernel for another device")


def save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


swiglu.register_autograd(
    lambda ctx, grad: swiglu_backward(grad, *ctx.saved_tensors), setup_context=save
)


def swiglu_backward_meaning(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    s = gate.sigmoid()
    return grad * up * s * (1 + gate * (1 - s)), grad * gate * s


def wrong_backward_meaning(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = swiglu_backward_meaning(grad, gate, up)
    return d_up, d_gate


def test_a_custom_operator_has_the_meaning_it_was_given(monkeypatch: pytest.MonkeyPatch):
    ops = torch.ops.oracle_test

    def proof() -> None:
        prove(lambda g, u: F.silu(g) * u, swiglu, (X, Y))

    with pytest.raises(AssertionError, match="another device"):
        proof()
    monkeypatch.setitem(oracle.INTERPRETERS, ops.swiglu.default, lambda g, u: F.silu(g) * u)
    monkeypatch.setitem(oracle.INTERPRETERS, ops.swiglu_backward.default, swiglu_backward_meaning)
    proof()
    monkeypatch.setitem(oracle.INTERPRETERS, ops.swiglu_backward.default, wrong_backward_meaning)
    with pytest.raises(Disproved, match="the gradient of input 0 differs"):
        proof()


def test_a_backward_written_by_hand_and_checkpointing():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
            ctx.save_for_backward(x)
            ctx.factor = factor
            return x * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
            return ctx.factor * grads[0] * ctx.saved_tensors[0], None

    prove(torch.square, lambda x: Square.apply(x, 2), (X,))
    with pytest.raises(Disproved, match=r"^the gradient of input 0 differs in 24 of 24 elements$"):
        prove(torch.square, lambda x: Square.apply(x, 1), (X,))
    prove(
        lambda x: (x @ x.t()).tanh(),
        lambda x: checkpoint(lambda y: (y @ y.t()).tanh(), x, use_reentrant=False),
        (X,),
    )
