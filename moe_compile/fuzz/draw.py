"""Draws blocks: which choices go together."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar, get_args

from moe_compile.fuzz.spec import (
    Activation,
    BlockSpec,
    ExpertNorm,
    LookAlike,
    Loop,
    Router,
    Storage,
)

T = TypeVar("T")

LISTED_LOOPS: tuple[Loop, ...] = (
    "where",
    "hit",
    "mask",
    "counts",
    "counts_numpy",
    "split",
    "dense_stack",
    "dense_sum",
    "dense_masked",
)
"""Loops that call one expert after the other."""

ZERO_LOOPS: tuple[Loop, ...] = ("grouped_mm", "where", "dense_output", "dense_sum", "gather_bmm")
"""Loops that can pass over picks of zero-computation experts."""

_GATED: tuple[Activation, ...] = tuple(a for a in get_args(Activation) if a.endswith("_glu"))
_PLAIN: tuple[Activation, ...] = tuple(a for a in get_args(Activation) if a not in _GATED)
_LOOK_ALIKE_SHARE = 0.08
_RAREST = 10_000

_SPELLINGS: dict[Loop, tuple[str, ...]] = {
    "grouped_mm": ("combine",),
    "where": ("skip_empty", "accumulate", "enumerated"),
    "hit": ("skip_empty", "accumulate"),
    "mask": ("enumerated",),
    "counts": ("skip_empty", "combine"),
    "counts_numpy": ("skip_empty", "combine"),
    "split": ("combine",),
    "dense_output": ("routing", "contracted", "states"),
    "dense_input": ("routing",),
    "dense_stack": ("routing", "enumerated"),
    "dense_sum": ("routing", "accumulate", "enumerated"),
    "dense_masked": ("enumerated",),
    "gather_einsum": ("contracted",),
    "gather_bmm": (),
}
"""The choices that each loop has."""


def draw(seed: int) -> BlockSpec:
    """The block of a seed."""
    rng = random.Random(seed)
    spec = _routed(rng, _sized(rng, seed))
    spec = _stored(rng, spec)
    spec = _looped(rng, spec)
    spec = _surrounded(rng, spec)
    return _disguised(rng, spec) if rng.random() < _LOOK_ALIKE_SHARE else spec


def select(first: int, count: int, only: Mapping[str, str]) -> list[int]:
    """Seeds from `first` on of blocks with these choices, written as `str` writes them.

    Raises:
        ValueError: if the grammar has no such choice, or no block has these at once.
    """
    for name in set(only) - {field.name for field in fields(BlockSpec)}:
        known = ", ".join(field.name for field in fields(BlockSpec))
        raise ValueError(f"--only got {name!r}; it takes {known}")
    tried = range(first, first + _RAREST * count)
    found = list(itertools.islice((s for s in tried if _has(draw(s), only)), count))
    if len(found) < count:
        wanted = ", ".join(f"{name}={value}" for name, value in only.items())
        raise ValueError(f"--only got {wanted}; {len(found)} blocks of {len(tried)} have that")
    return found


def _has(spec: BlockSpec, only: Mapping[str, str]) -> bool:
    return all(str(getattr(spec, name)) == value for name, value in only.items())


def _sized(rng: random.Random, seed: int) -> BlockSpec:
    """Few experts: loops over them are unrolled, and a third one is like the fourth."""
    experts = rng.choice([3, 4])
    return BlockSpec(
        seed=seed,
        experts=experts,
        top_k=min(rng.choice([1, 2, 2, 2, 3]), experts - 1),
        hidden=rng.choice([8, 16]),
        width=rng.choice([8, 16, 24]),
    )


def _routed(rng: random.Random, spec: BlockSpec) -> BlockSpec:
    router: Router = rng.choice(get_args(Router))
    spec = replace(
        spec,
        router=router,
        router_module=_often(rng),
        router_linear=_half(rng),
        router_bias=_seldom(rng),
        router_float32=_half(rng),
        normalized=rng.choice(("no", "plain", "in_place", "epsilon")),
        scaling=rng.choice([1.0, 1.0, 2.5]),
        weights_early=_half(rng),
    )
    if router in ("argmax", "max"):
        return replace(spec, top_k=1, normalized="no")
    if router in ("topk_softmax", "scatter_sigmoid", "p_norm"):
        return replace(spec, normalized="no")
    if router in ("groups_top2", "groups_max"):
        fill = rng.choice(("0.0", '-float("inf")'))
        groups = rng.choice([2, 4])
        top_k = min(spec.top_k, groups)
        return replace(spec, experts=2 * groups, top_k=top_k, groups=groups, group_fill=fill)
    return spec


def _stored(rng: random.Random, spec: BlockSpec) -> BlockSpec:
    storage: Storage = rng.choice([*get_args(Storage), "module_list", "stacked"])
    gated = storage.startswith("interleaved") or storage == "flat" or _often(rng)
    activation = rng.choice(_GATED if gated else _PLAIN)
    fused = storage in ("module_list", "module_dict") and gated and _seldom(rng)
    halves = gated and (fused or storage.startswith("stacked"))
    return replace(
        spec,
        storage=storage,
        activation=activation,
        activation_module=_half(rng),
        fused=fused,
        bias=storage != "flat" and _seldom(rng),
        swapped=halves and _seldom(rng),
        sliced=halves and _half(rng),
        experts_module=_often(rng),
    )


def _looped(rng: random.Random, spec: BlockSpec) -> BlockSpec:
    loop = rng.choice(LISTED_LOOPS if spec.listed else tuple(_SPELLINGS))
    drawn: dict[str, Any] = {
        "skip_empty": _half(rng),
        "accumulate": rng.choice(("index_add", "index_add_", "setitem")),
        "combine": rng.choice(("inverse", "scattered", "argsort", "index_add")),
        "routing": rng.choice(("scatter", "scatter_", "one_hot")),
        "contracted": _half(rng),
        "states": rng.choice(("expand", "repeat", "broadcast")),
        "enumerated": spec.storage == "module_list" and _half(rng),
    }
    spec = replace(spec, loop=loop, **{name: drawn[name] for name in _SPELLINGS[loop]})
    # An expert without tokens would still add its biases.
    return replace(spec, bias=False) if loop == "dense_input" else spec


def _surrounded(rng: random.Random, spec: BlockSpec) -> BlockSpec:
    zero = spec.loop in ZERO_LOOPS and spec.groups == 1 and rng.random() < 0.05
    return replace(
        spec,
        shared=rng.choice(("none", "none", "plain", "gated")),
        scale_after=rng.choice([1.0, 1.0, 1.0, 0.5]),
        norm_before=_seldom(rng),
        residual=_seldom(rng),
        latent=spec.hidden == 16 and rng.random() < 0.1,
        expert_norm=_norm(rng, spec),
        zero_experts=2 if zero else 0,
        logits_out=_half(rng),
    )


def _norm(rng: random.Random, spec: BlockSpec) -> ExpertNorm:
    """Seldom any; in a list of modules none is shared."""
    kind: ExpertNorm = rng.choice(("own", "shared", "torch"))
    if rng.random() > 0.1 or spec.loop == "dense_input":
        return "none"
    return "own" if kind == "shared" and spec.listed else kind


def _disguised(rng: random.Random, spec: BlockSpec) -> BlockSpec:
    """A block that only looks like a mixture of experts, in a loop that can say so."""
    look_alike: LookAlike = rng.choice([a for a in get_args(LookAlike) if a != "none"])
    spec = replace(spec, look_alike=look_alike, zero_experts=0, enumerated=False)
    if look_alike in ("expert_choice", "capacity"):
        return replace(spec, loop="where", skip_empty=False)
    if look_alike == "unpicked_bias":
        storage = "stacked" if spec.listed or spec.storage == "flat" else spec.storage
        return replace(spec, storage=storage, loop="dense_input", bias=True, fused=False)
    if look_alike in ("mean_subtracted", "softmax_over_tokens"):
        grouped = spec.loop == "grouped_mm"
        return replace(spec, loop=spec.loop if grouped else rng.choice(LISTED_LOOPS))
    if look_alike in ("product", "maximum"):
        return replace(spec, loop=rng.choice(("mask", "counts", "dense_stack")), combine="inverse")
    # With one pick a token, some of the others would be mixtures.
    router = "softmax_topk" if spec.router in ("argmax", "max") else spec.router
    top_k = max(spec.top_k, 2)
    return replace(spec, loop=rng.choice(("where", "hit")), router=router, top_k=top_k)


def _half(rng: random.Random) -> bool:
    return rng.random() < 0.5


def _often(rng: random.Random) -> bool:
    return rng.random() < 0.7


def _seldom(rng: random.Random) -> bool:
    return rng.random() < 0.25
