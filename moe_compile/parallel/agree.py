"""All ranks must do the same: a rank that did other things, or failed, would be waited for."""

import hashlib
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from moe_compile.parallel.layout import Layout

T = TypeVar("T")

PATIENCE = timedelta(minutes=2)
_meetings: dict[str, int] = {}

_SAME = (
    "it takes the same on all of them; give every rank the same model, config and passes, and the "
    "same versions of torch and transformers"
)


class _Apart(RuntimeError):
    """Another rank failed, or is somewhere else, and will not answer any more."""


def on_every_rank(
    what: str, action: Callable[[], T], ranks: int, group: dist.ProcessGroup | None = None
) -> T:
    """Runs the action on each rank of a group; where one fails, all stop, and nobody waits for it.

    The others hear of it at the action's end, or where they compare plans in it.

    Raises:
        RuntimeError: saying what failed, and on which rank; that rank raises its own error.
    """
    if ranks == 1:
        return action()
    try:
        result = action()
    except _Apart:
        raise
    except Exception as error:
        _hear("failed", f"{what} failed on rank {dist.get_rank(group)}: {error!r}", ranks, group)
        raise
    _check_together(_hear("done", what, ranks, group))
    return result


def _hear(
    place: str, text: str, ranks: int, group: dist.ProcessGroup | None
) -> list[tuple[str, str]]:
    """Says where this rank is; returns what each of them says."""
    heard: list[tuple[str, str]] = [("", "")] * ranks
    dist.all_gather_object(heard, (place, text), group=group)
    return heard


def _check_together(heard: list[tuple[str, str]]) -> None:
    """Nobody failed, and all are at the same place."""
    for place, text in heard:
        if place == "failed":
            raise _Apart(text)
    first = heard[0][0]
    for rank, (place, _) in enumerate(heard):
        if place != first:
            raise _Apart(
                f"optimize got different plans on its ranks: rank 0 is {first}, rank {rank} is "
                f"{place}; {_SAME}"
            )


def meet(what: str, group: dist.ProcessGroup | None) -> None:
    """Waits until every rank of a group is here; None is the whole job.

    It needs no collective, which an absent rank would confuse.

    Raises:
        RuntimeError: after `PATIENCE`, naming the ranks that did not come.
    """
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    own = dist.get_rank(group)
    place = f"moe_compile/{what}/{ranks}"
    store = PrefixStore(f"{place}/{_meetings.get(place, 0)}", _get_default_store())
    store.set(str(own), "here")
    try:
        store.wait([str(rank) for rank in range(len(ranks))], PATIENCE)
    except RuntimeError:  # every kind of store has its own
        absent = [str(rank) for rank in range(len(ranks)) if not store.check([str(rank)])]
        store.delete_key(str(own))
        raise RuntimeError(
            f"{what} got a call from rank {own}, and in {PATIENCE.seconds} seconds none "
            f"from rank {', '.join(absent)}; it takes one from every rank, since each has a part "
            "of the model; call it on all of them; give a Trainer moe_compile.TrainerMixin, as it "
            "saves on rank 0 alone"
        ) from None
    _meetings[place] = _meetings.get(place, 0) + 1


def check_agreement(plan: list[str], layout: Layout) -> None:
    """Compares the plan of every rank, a line for each thing that will be done.

    Raises:
        ValueError: on every rank, naming the first line in which a rank differs from rank 0.
    """
    digest = hashlib.sha256("\n".join(plan).encode()).hexdigest()
    heard = _hear("comparing", digest, layout.ranks, layout.group)
    _check_together(heard)
    if len(set(heard)) == 1:
        return
    plans: list[list[str]] = [[] for _ in range(layout.ranks)]
    dist.all_gather_object(plans, plan, group=layout.group)
    raise ValueError(_difference(plans))


def said_by_first(text: str, layout: Layout) -> str:
    """What rank 0 says, on every rank; what the others say is dropped.

    Raises:
        RuntimeError: if a rank failed meanwhile, or is somewhere else.
    """
    heard = _hear(
        "listening to rank 0", text if layout.rank == 0 else "", layout.ranks, layout.group
    )
    _check_together(heard)
    return heard[0][1]


def _difference(plans: list[list[str]]) -> str:
    first = plans[0]
    for rank, plan in enumerate(plans):
        for ours, theirs in zip([*first, "(nothing)"], [*plan, "(nothing)"], strict=False):
            if ours != theirs:
                return (
                    f"optimize got different plans on its ranks: rank 0 has {ours!r}, rank {rank} "
                    f"has {theirs!r}; {_SAME}"
                )
    raise AssertionError("equal plans have equal hashes")
