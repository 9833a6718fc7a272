import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.passes import RaiseAttention
from moe_compile.patterns import EagerAttention
from moe_compile.rewrite.pattern import Template, templates
from tests.patterns.harness import (
    BATCH,
    SEQUENCE,
    Function,
    assert_raised,
    assert_refused,
    assert_same_algebra,
    canonical_node,
    normal,
    spelling,
    unit_of,
)
from tests.patterns.idioms import SCALE, attention_unit, eager_attention

SPELLINGS = templates(EagerAttention())


def softmax(logits: Tensor, dim: int = -1) -> Tensor:
    return F.softmax(logits, dim=dim, dtype=torch.float32).to(logits.dtype)


def equal_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return torch.matmul(softmax(query @ key.mT * SCALE + mask), value)


def unmasked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return torch.matmul(softmax(query @ key.mT * SCALE), value) + 0 * mask[..., :1]


def respelled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Operands swapped, casts and reshapes that do nothing, dropout that is off."""
    logits = mask.to(query.dtype) + SCALE * query.matmul(key.permute(0, 1, 3, 2))
    weights = F.dropout(softmax(logits.contiguous()), p=0.0).to(query.dtype)
    return weights.matmul(value.view(value.shape))


def with_sinks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    logits = torch.matmul(query, key.transpose(2, 3)) * SCALE + mask
    sink = sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
    logits = torch.cat([logits, sink], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    weights = F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]
    return torch.matmul(weights.to(value.dtype), value)


@pytest.mark.parametrize(
    ("function", "heads"), [(eager_attention, 2), (equal_heads, 4), (respelled, 4)]
)
def test_rewrites(function: Function, heads: int) -> None:
    unit = attention_unit(function, heads, masked=True)
    assert_raised(RaiseAttention(), unit, ["attention"])
    node = canonical_node(unit)
    assert node.kwargs == {"scale": SCALE}
    assert [x.meta["val"].shape[1] for x in node.all_input_nodes] == [4, heads, heads, 1]


def test_rewrites_attention_without_a_mask() -> None:
    unit = attention_unit(unmasked, masked=True)
    assert_raised(RaiseAttention(), unit, ["attention", "slice", "mul", "add"])
    assert canonical_node(unit).args[3] is None


def test_rewrites_attention_with_sinks() -> None:
    qkv = (normal(BATCH, 4, SEQUENCE, 8) for _ in range(3))
    mask = normal(BATCH, 1, SEQUENCE, SEQUENCE)
    unit = unit_of(with_sinks, *qkv, mask, sinks=normal(4))
    assert_raised(RaiseAttention(), unit, ["attention"])
    sinks = canonical_node(unit).args[4]
    assert str(sinks) in {str(n) for n in unit.graph.nodes if n.target == "sinks"}


def over_queries(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return torch.matmul(softmax(query @ key.mT * SCALE + mask, dim=-2), value)


def in_the_inputs_dtype(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return torch.matmul((query @ key.mT * SCALE + mask).softmax(-1), value)


def values_for_keys(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return torch.matmul(softmax(query @ key.sin() * SCALE + mask), value)


def learned_scale(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return torch.matmul(softmax(query @ key.mT * mask[..., :1] + mask), value)


def weights_used_outside(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    weights = softmax(query @ key.mT * SCALE + mask)
    return torch.matmul(weights, value), weights


def tiled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Heads in another order than `repeat_interleave` gives: head h reads key head h % 2."""
    key, value = (t.repeat(1, 2, 1, 1) for t in (key, value))
    return equal_heads(query, key, value, mask)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (over_queries, "expected dim=3, found 2"),
        (in_the_inputs_dtype, "expected dtype=torch.float32, found None"),
        (values_for_keys, "expected aten.transpose.int, found aten.sin.default"),
        (learned_scale, "a computed value where a literal is expected"),
        (weights_used_outside, "the inner value softmax.* is used by exit.* outside the idiom"),
    ],
)
def test_refuses(function: Function, reason: str) -> None:
    unit = attention_unit(function, masked=True)
    assert_refused(RaiseAttention(), EagerAttention(), unit, reason)


def test_heads_that_are_tiled_stay_tiled() -> None:
    unit = attention_unit(tiled, 2, masked=True)
    assert_raised(RaiseAttention(), unit, ["repeat", "repeat", "attention"])


@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_parity(template: Template) -> None:
    assert_same_algebra(template, scale=SCALE)
