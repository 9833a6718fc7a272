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


def on_every_rank(
    what: str, action: Callable[[], T], ranks: int, group: dist.ProcessGroup | None = None
) -> T:
    """Runs the action on each rank of a group; where one fails, all stop, and nobody waits for it.

    Raises:
        RuntimeError: saying what failed, and on which rank; that rank raises its own error.
    """
    if ranks == 1:
        return action()
    failure: Exception | None = None
    result: list[T] = []
    try:
        result.append(action())
    except Exception as error:
        failure = error
    failures: list[str | None] = [None] * ranks
    dist.all_gather_object(failures, None if failure is None else repr(failure), group=group)
    if failure is not None:
        raise failure
    for rank, text in enumerate(failures):
        if text is not None:
            raise RuntimeError(f"{what} failed on rank {rank}: {text}")
    return result[0]


def meet(what: str, layout: Layout) -> None:
    """Waits until every rank is here. It needs no collective, which an absent rank would confuse.

    Raises:
        RuntimeError: after `PATIENCE`, naming the ranks that did not come.
    """
    ranks = dist.get_process_group_ranks(layout.group or dist.group.WORLD)
    place = f"moe_compile/{what}/{ranks}"
    store = PrefixStore(f"{place}/{_meetings.get(place, 0)}", _get_default_store())
    store.set(str(layout.rank), "here")
    try:
        store.wait([str(rank) for rank in range(len(ranks))], PATIENCE)
    except RuntimeError:  # every kind of store has its own
        absent = [str(rank) for rank in range(len(ranks)) if not store.check([str(rank)])]
        store.delete_key(str(layout.rank))
        raise RuntimeError(
            f"{what} got a call from rank {layout.rank}, and in {PATIENCE.seconds} seconds none "
            f"from rank {', '.join(absent)}; it takes one from every rank, since each has a part "
            'of the model; call it on all of them; give Trainer save_strategy="no", as it saves on '
            "rank 0 alone"
        ) from None
    _meetings[place] = _meetings.get(place, 0) + 1


def check_agreement(plan: list[str], layout: Layout) -> None:
    """Compares the plan of every rank, a line for each thing that will be done.

    Raises:
        ValueError: on every rank, naming the first line in which a rank differs from rank 0.
    """
    digest = hashlib.sha256("\n".join(plan).encode()).hexdigest()
    digests: list[str | None] = [None] * layout.ranks
    dist.all_gather_object(digests, digest, group=layout.group)
    if len(set(digests)) == 1:
        return
    plans: list[list[str]] = [[] for _ in digests]
    dist.all_gather_object(plans, plan, group=layout.group)
    raise ValueError(_difference(plans))


def _difference(plans: list[list[str]]) -> str:
    first = plans[0]
    for rank, plan in enumerate(plans):
        for ours, theirs in zip([*first, "(nothing)"], [*plan, "(nothing)"], strict=False):
            if ours != theirs:
                return (
                    f"optimize got different plans on its ranks: rank 0 has {ours!r}, rank {rank} "
                    f"has {theirs!r}; it takes the same on all of them; give every rank the same "
                    "model, config and passes, and the same versions of torch and transformers"
                )
    raise AssertionError("equal plans have equal hashes")
