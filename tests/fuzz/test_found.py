"""Blocks that campaigns found, and what is to become of them."""

import pytest

from moe_compile.fuzz.judge import judge
from moe_compile.fuzz.spec import BlockSpec, Router


@pytest.mark.parametrize("router", ["argmax", "topk_softmax"])
def test_experts_that_pick_tokens_are_refused(router: Router) -> None:
    """The block's own picks lead nowhere, so no selection among experts is left in its graph."""
    verdict = judge(
        BlockSpec(
            seed=13632,
            experts=4,
            top_k=1,
            hidden=16,
            width=16,
            router=router,
            router_module=False,
            experts_module=False,
            loop="where",
            shared="gated",
            look_alike="expert_choice",
        )
    )
    assert verdict.outcome == "refused"
    assert "no expert ids [tokens, k] lead to the experts' rows" in verdict.reason


def test_picks_beyond_latent_experts_add_nothing_to_them() -> None:
    """The identity of such a pick is of another width than the experts' sum, and beside it."""
    verdict = judge(
        BlockSpec(
            seed=10270,
            experts=4,
            top_k=2,
            hidden=16,
            width=24,
            router="topk_softmax",
            router_module=False,
            storage="module_list",
            loop="where",
            latent=True,
            zero_experts=2,
        )
    )
    assert (verdict.outcome, verdict.reason) == ("proven", "")


def test_gradients_that_are_zero_but_for_rounding_do_not_decide() -> None:
    """A single pick's weight is divided by itself, so that the router learns nothing."""
    verdict = judge(
        BlockSpec(
            seed=11,
            experts=4,
            top_k=1,
            hidden=8,
            width=8,
            router="sigmoid_bias",
            router_linear=True,
            router_bias=True,
            normalized="plain",
            storage="interleaved_transposed",
            bias=True,
            activation="gelu_tanh_glu",
            loop="dense_sum",
            routing="scatter_",
            shared="gated",
            scale_after=0.5,
        )
    )
    assert (verdict.outcome, verdict.reason) == ("proven", "")
