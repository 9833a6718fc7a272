"""Send the tokens in chunks: the experts of one compute while the next one travels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_compile import ops
from moe_compile.parallel.chunks import num_tokens, token_chunks
from moe_compile.passes.facts import (
    DISPATCH_WHOLE,
    EXPERTS_PLACED,
    LOWERED,
    PLANNED,
    TOKENS_CHUNKED,
)
from moe_compile.rewrite.journeys import Journey, journeys
from moe_compile.rewrite.pipeline import Pass
from moe_compile.rewrite.unit_graph import UnitGraph
from moe_compile.rewrite.writing import ARRIVALS, Writer, received, unknown_size


@dataclass(frozen=True)
class ChunkTokens(Pass):
    """In: placed experts. Out: starts and waits of `chunks` parts of the tokens, in turns.

    start 0, start 1, wait 0, experts 0, start back 0, start 2, wait 1, experts 1, start back 1, ...
    and in the end all waits for what comes back. Each op takes what the one before it was done by,
    so that no compiler changes their order, which is the same on all ranks.

    Raises:
        ValueError: for fewer than 2 chunks.
    """

    name = "chunk_tokens"
    needs = frozenset({EXPERTS_PLACED, DISPATCH_WHOLE})
    gives = frozenset({TOKENS_CHUNKED})
    breaks = frozenset({DISPATCH_WHOLE, PLANNED, LOWERED})

    chunks: int = 2

    def __post_init__(self) -> None:
        if self.chunks < 2:
            raise ValueError(
                f"ChunkTokens got chunks={self.chunks!r}; it takes a number from 2 on; leave the "
                "pass out to send all tokens at once"
            )

    def run(self, unit: UnitGraph) -> int:
        """Returns how many blocks of experts get their tokens in chunks."""
        found = journeys(unit.graph)
        for journey in found:
            _Chunking(journey, self.chunks, self.name).run()
        return len(found)


class _Chunking:
    """Writes the chunks of one dispatch, and all that happens to them."""

    def __init__(self, journey: Journey, chunks: int, name: str) -> None:
        self.journey, self.chunks = journey, chunks
        self.writer = Writer.beside(journey.dispatch, name)
        self.count, self.group, most = journey.dispatch.args[3:6]
        self.most = None if most is None else -(-most // chunks)  # type: ignore[operator]
        self.after: fx.Node | None = None

    def run(self) -> None:
        combine = self.journey.combine
        with combine.graph.inserting_before(combine):
            tokens = list(zip(*map(self._cut, self.journey.dispatch.args[:3]), strict=True))
            sizes = [self._size(x) for x, _, _ in tokens]
            departed = [self._start(tokens[0], 0)]
            back: list[fx.Node] = []
            for i in range(self.chunks):
                if i + 1 < self.chunks:
                    departed.append(self._start(tokens[i + 1], i + 1))
                back.append(self._compute(departed[i], tokens[i], sizes[i], i))
            outs = [self._wait(*each, i) for i, each in enumerate(zip(back, sizes, strict=True))]
            whole = self.writer.add(torch.ops.aten.cat.default, (outs, 0), combine.meta["val"])
        combine.replace_all_uses_with(whole)
        for node in (combine, self.journey.experts, self.journey.dispatch):
            for user in list(node.users):
                node.graph.erase_node(user)
            node.graph.erase_node(node)

    def _cut(self, whole: Any) -> list[fx.Node]:
        value = whole.meta["val"]
        parts = [value.new_empty(unknown_size(value), *value.shape[1:]) for _ in range(self.chunks)]
        cut = self.writer.add(token_chunks, (whole, self.chunks), parts)
        return [self.writer.item(cut, i) for i in range(self.chunks)]

    def _size(self, chunk: fx.Node) -> fx.Node:
        return self.writer.add(num_tokens, (chunk,), chunk.meta["val"].shape[0])

    def _start(self, tokens: tuple[fx.Node, ...], chunk: int) -> fx.Node:
        given = *tokens, self.count, self.group, self.most, self.after
        values = [node.meta["val"] for node in tokens]
        return self._chain(ops.start_dispatch, given, [values[0].new_empty(1), *values], chunk)

    def _compute(
        self, flight: fx.Node, tokens: tuple[fx.Node, ...], size: fx.Node, chunk: int
    ) -> fx.Node:
        values = [node.meta["val"] for node in tokens]
        arrived = (*received(*values), values[0].new_empty(1))
        sent = self._chain(
            ops.wait_dispatch, (flight, self.group, self.most, self.after), arrived, chunk
        )
        rows = {name: self.writer.item(sent, i) for i, name in enumerate(ARRIVALS)}
        experts = self.journey.experts
        out = experts.meta["val"].new_empty(arrived[0].shape[0], *experts.meta["val"].shape[1:])
        result = self.writer.add(ops.experts, (), out, {**experts.kwargs, **rows})
        result.meta = experts.meta | result.meta | {"chunk": chunk}
        handle = self.writer.item(sent, len(ARRIVALS))
        given = result, handle, size, self.group, self.after
        value = [values[0].new_empty(1), out.new_empty(values[0].shape[0], *out.shape[1:])]
        return self._chain(ops.start_combine, given, value, chunk)

    def _wait(self, flight: fx.Node, size: fx.Node, chunk: int) -> fx.Node:
        given = flight, size, self.group, self.after
        done, out = flight.meta["val"]
        return self.writer.item(self._chain(ops.wait_combine, given, (out, done), chunk), 0)

    def _chain(self, op: Any, given: tuple[Any, ...], value: Any, chunk: int) -> fx.Node:
        """Adds an op that comes after the last one."""
        node = self.writer.add(op, given, value)
        node.meta["chunk"] = chunk
        is_start = isinstance(value, list)
        self.after = self.writer.item(node, 0 if is_start else len(value) - 1)
        return node
