from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from moe_compile.install.cut import cut
from moe_compile.passes import RaiseAttention
from moe_compile.patterns import SDPAAttention
from moe_compile.rewrite.pattern import Template, templates
from moe_compile.rewrite.refuse import Refuse
from tests.patterns.harness import (
    Function,
    assert_raised,
    assert_refused,
    assert_same_algebra,
    canonical_node,
    spelling,
)
from tests.patterns.idioms import SCALE, attention_unit, repeat_heads, sdpa_attention

SPELLINGS = templates(SDPAAttention())


def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sdpa_attention(query, repeat_heads(key, 2), repeat_heads(value, 2))


def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=SCALE, enable_gqa=True
    )


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, scale=SCALE)


def dropping(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, dropout_p=0.1, scale=SCALE)


def respelled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Casts and reshapes that do nothing, and copies of the heads made another way."""
    key, value = (
        t.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2).contiguous() for t in (key, value)
    )
    return sdpa_attention(query.contiguous(), key.to(query.dtype), value.view(value.shape))


@pytest.mark.parametrize(
    ("function", "heads", "options"),
    [
        (sdpa_attention, 4, {"causal": True, "dropout": 0.0}),
        (repeated, 2, {"causal": True, "dropout": 0.0}),
        (respelled, 2, {"causal": True, "dropout": 0.0}),
        (grouped, 2, {"causal": True, "dropout": 0.0}),
        (masked, 4, {"causal": False, "dropout": 0.0}),
        (dropping, 4, {"causal": False, "dropout": 0.1}),
    ],
)
def test_rewrites(function: Function, heads: int, options: dict[str, Any]) -> None:
    unit = attention_unit(function, heads, masked=function is masked)
    assert_raised(RaiseAttention(), unit, ["attention"])
    node = canonical_node(unit)
    assert node.kwargs == options | {"scale": SCALE}
    assert (node.args[3] is not None) == (function is masked)


def test_takes_the_key_and_value_heads_unrepeated() -> None:
    unit = attention_unit(repeated, 2)
    assert RaiseAttention().run(unit) == 1
    assert [node.meta["val"].shape[1] for node in canonical_node(unit).all_input_nodes] == [4, 2, 2]


def default_scale(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def test_refuses_the_default_scale() -> None:
    unit = attention_unit(default_scale)
    reason = "a computed value where a literal is expected"
    assert_refused(RaiseAttention(), SDPAAttention(), unit, reason)


def scaled_by_length(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale: Any = query.shape[2] ** -0.5
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def test_a_scale_that_depends_on_the_length_is_no_literal() -> None:
    unit = attention_unit(scaled_by_length)
    RaiseAttention().run(unit)
    with pytest.raises(Refuse, match="cannot be read off the arguments"):
        cut(unit, 0)


def keys_used_outside(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The copies of the keys must stay, so they are taken as they are."""
    wide = repeat_heads(key, 2)
    return sdpa_attention(query, wide, repeat_heads(value, 2)), wide.sin()


def test_copies_of_heads_that_are_used_outside_are_taken_as_they_are() -> None:
    unit = attention_unit(keys_used_outside, 2)
    assert RaiseAttention().run(unit) == 1
    assert [node.meta["val"].shape[1] for node in canonical_node(unit).all_input_nodes] == [4, 4, 4]


@pytest.mark.parametrize("template", SPELLINGS, ids=spelling)
def test_parity(template: Template) -> None:
    assert_same_algebra(template, scale=SCALE, dropout=0.0)
