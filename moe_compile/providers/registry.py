"""The choice of a provider for each call of a canonical op."""

from typing import Any

from moe_compile.ops.canonical import CanonicalOp
from moe_compile.providers.all_to_all import AllToAllProvider
from moe_compile.providers.deepep import DeepEPProvider
from moe_compile.providers.flex_attention import FlexAttentionProvider
from moe_compile.providers.formula import FormulaProvider
from moe_compile.providers.liger import LigerProvider
from moe_compile.providers.provider import Call, Lacks, Provider
from moe_compile.providers.quack import QuackProvider
from moe_compile.providers.torch import TorchProvider
from moe_compile.providers.transformer_engine import TransformerEngineProvider
from moe_compile.providers.triton import TritonProvider
from moe_compile.rewrite.refuse import Refuse

PROVIDERS: tuple[Provider, ...] = (
    TorchProvider(),
    DeepEPProvider(),
    AllToAllProvider(),
    FormulaProvider(),
    FlexAttentionProvider(),
    LigerProvider(),
    TransformerEngineProvider(),
    QuackProvider(),
    TritonProvider(),
)
"""Those that are chosen from; where none can be timed, the first that takes a call computes it."""


def takers(op: CanonicalOp[..., Any], call: Call) -> tuple[list[Provider], dict[str, str]]:
    """The providers that take the call, in order; and why others with something for it do not."""
    refusals = {provider: provider.supports(op, call) for provider in PROVIDERS}
    taking = [provider for provider, refusal in refusals.items() if refusal is None]
    left_out = {
        provider.name: refusal.reason
        for provider, refusal in refusals.items()
        if refusal is not None and not isinstance(refusal, Lacks)
    }
    return taking, left_out


def refusals_of(op: CanonicalOp[..., Any], call: Call) -> list[str] | None:
    """Why no provider takes the call; None if one does."""
    refusals = [provider.supports(op, call) for provider in PROVIDERS]
    if None in refusals:
        return None
    reasons = [r.reason for r in refusals if r is not None and not isinstance(r, Lacks)]
    return list(dict.fromkeys(reasons)) or [f"no provider has {op.name} on this device"]


def choose(
    op: CanonicalOp[..., Any], call: Call, wanted: str | None = None
) -> tuple[Provider, list[Refuse]]:
    """The first provider that takes the call, and the refusals of those before it.

    Args:
        op: The op called.
        call: Its arguments.
        wanted: The name of the only provider to ask, or None for all of them.

    Raises:
        ValueError: No provider is called `wanted`.
        Refuse: No provider asked takes the call.
    """
    asked = [p for p in PROVIDERS if wanted in (None, p.name)]
    if not asked:
        names = ", ".join(repr(p.name) for p in PROVIDERS)
        raise ValueError(
            f"no provider is called {wanted!r}; choose one of {names}, or leave it out"
        )
    refusals: list[Refuse] = []
    for provider in asked:
        refusal = provider.supports(op, call)
        if refusal is None:
            return provider, refusals
        refusals.append(refusal)
    raise Refuse(f"no provider takes {op.name}: " + "; ".join(r.reason for r in refusals))


def choose_dispatcher(
    op: CanonicalOp[..., Any], call: Call, wanted: str | None = None
) -> tuple[Provider, str | None]:
    """Who dispatches: `wanted`, or DeepEP, or else all_to_all, which takes every call.

    `op` is `dispatch`, or `start_dispatch`.

    Returns:
        the provider, and why it had to be all_to_all instead of the other one.
    """
    first, last = _named(wanted or "deepep"), _named("all_to_all")
    refusal = first.supports(op, call)
    return (first, None) if refusal is None else (last, refusal.reason)


def _named(name: str) -> Provider:
    return next(provider for provider in PROVIDERS if provider.name == name)
