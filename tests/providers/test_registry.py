from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moe_compile.ops import CanonicalOp, dispatch, rms_norm
from moe_compile.providers import Call, Provider, choose, registry
from moe_compile.providers.registry import takers
from moe_compile.rewrite.refuse import Refuse


@dataclass(frozen=True)
class Unwilling:
    name: str = "unwilling"
    package: str | None = None

    def supports(self, op: CanonicalOp[..., Any], call: Call) -> Refuse | None:
        return Refuse("not today")

    def keeps(self, op: CanonicalOp[..., Any]) -> str | None:
        return None

    def implementation(self, op: CanonicalOp[..., Any]) -> Callable[..., Any]:
        raise AssertionError


CALL = Call((torch.ones(2, 3), None, 1e-6))


@pytest.fixture
def two_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    providers: tuple[Provider, ...] = (Unwilling(), *registry.PROVIDERS)
    monkeypatch.setattr(registry, "PROVIDERS", providers)


def test_arguments_are_bound_with_defaults() -> None:
    arguments = CALL.arguments(rms_norm)
    assert list(arguments) == ["x", "weight", "eps", "cast_first", "offset"]
    assert arguments["offset"] == 0.0


@pytest.mark.usefixtures("two_providers")
def test_the_first_that_takes_the_call() -> None:
    provider, refusals = choose(rms_norm, CALL)
    assert provider.name == "torch"
    assert [r.reason for r in refusals] == ["not today"]


@pytest.mark.usefixtures("two_providers")
def test_the_wanted_one_alone_is_asked() -> None:
    provider, refusals = choose(rms_norm, CALL, "torch")
    assert (provider.name, refusals) == ("torch", [])
    with pytest.raises(Refuse, match="no provider takes rms_norm: not today"):
        choose(rms_norm, CALL, "unwilling")


@pytest.mark.usefixtures("two_providers")
def test_takers_and_the_reasons_of_those_that_could() -> None:
    taking, left_out = takers(rms_norm, CALL)
    assert [provider.name for provider in taking] == ["torch", "formula"]
    assert left_out == {"unwilling": "not today"}  # nothing of who has no norm, or not on a CPU


def test_an_unknown_name() -> None:
    with pytest.raises(
        ValueError, match="no provider is called 'tensorflow'; choose one of 'torch'"
    ):
        choose(rms_norm, CALL, "tensorflow")


def test_no_provider() -> None:
    call = Call((torch.ones(2, 3), torch.zeros(2, 1), torch.ones(2, 1), 4, "world"))
    with pytest.raises(Refuse, match="torch has no implementation of dispatch"):
        choose(dispatch, call, "torch")
