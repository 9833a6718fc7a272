"""All ranks must plan the same: a rank that rewrote other things would wait for ever."""

import hashlib

import torch.distributed as dist

from moe_compile.parallel.layout import Layout


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
