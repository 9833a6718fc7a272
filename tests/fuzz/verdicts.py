"""Verdicts without a judgement."""

from moe_compile.fuzz.campaign import Tally
from moe_compile.fuzz.judge import Outcome, Verdict
from moe_compile.fuzz.spec import BlockSpec

SPEC = BlockSpec(seed=5, experts=4, top_k=2, hidden=8, width=8, loop="where")


def tally(*outcomes: Outcome) -> Tally:
    result = Tally()
    for outcome in outcomes:
        reason = "" if outcome == "proven" else "5 of 7 operations fit"
        result.add(Verdict(SPEC, outcome, reason, 0.5, {"trace": 0.25}))
    return result
