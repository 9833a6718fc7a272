"""Counts and tables of a campaign."""

import dataclasses

import pytest

from moe_compile.fuzz.campaign import Tally, describe, verdicts
from moe_compile.fuzz.judge import FAILURES, Verdict
from tests.fuzz.verdicts import SPEC, tally


def test_shares_are_of_supported_blocks() -> None:
    counted = tally("proven", "proven", "proven", "refused")
    look_alike = dataclasses.replace(SPEC, look_alike="product")
    counted.add(Verdict(look_alike, "refused", "no", 0.5))
    assert counted.proven_share == 75.0
    assert counted.failures == []
    assert counted.line() == "3 proven, 2 refused, 0 wrong, 0 silent, 0 crashed"
    assert Tally().proven_share == 100.0


def test_the_table() -> None:
    table = tally("proven", "refused", "refused").table()
    assert "proven of the supported: 33.3 %" in table
    assert "     2  # of # operations fit" in table
    assert "seconds a block: 0.50 (trace 0.25, comparison 0.25)" in table
    assert "where               1 of     3 proven" in table


def test_failures_are_described() -> None:
    counted = tally("proven", "wrong", "silent", "crashed")
    assert [v.outcome for v in counted.failures] == list(FAILURES)
    text = describe(counted.failures[0])
    assert "moe-compile fuzz --block 5" in text
    assert "loop=where" in text
    assert "class MoEBlock(nn.Module):" in text


@pytest.mark.matrix
def test_processes_agree() -> None:
    found = list(verdicts([12, 5], jobs=2))
    assert [v.spec.seed for v in found] == [12, 5]
    assert [v.outcome for v in found] == [v.outcome for v in verdicts([12, 5])]
