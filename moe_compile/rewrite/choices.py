"""How many values experts' ids may have: those beyond the experts are choices too.

The graph of a module by itself does not show what its arguments were selected from. What its
caller's graph shows of them is noted on them.
"""

import operator

import torch
from torch import Tensor, fx

from moe_compile.rewrite.normal_form import aten, schema_arguments, value

_SAME_IDS = {aten.to.dtype, aten.reshape.default, aten.clone.default, operator.getitem}
_SELECTIONS = {
    aten.topk.default,
    aten.sort.default,
    aten.argmax.default,
    aten.argsort.default,
    aten.max.dim,
}
_NOTE = "choices"


def choices_of(ids: fx.Node, experts: int) -> int:
    """How many values ids can have: what they are selected from may be more than the experts."""
    return max(_known_choices(ids) or 0, experts)


def known_choices(arguments: list[fx.Node]) -> tuple[int | None, ...]:
    """Of each argument of a call, how many values it can have where it is selected ids."""
    return tuple(_known_choices(node) if _may_be_ids(node) else None for node in arguments)


def note_choices(arguments: list[fx.Node], choices: tuple[int | None, ...]) -> None:
    """Notes it on the arguments in the module's own graph.

    Of another form of the call, with more tensors or fewer, nothing is known.
    """
    known = choices if len(choices) == len(arguments) else [None] * len(arguments)
    for argument, count in zip(arguments, known, strict=True):
        if count is not None and _may_be_ids(argument):
            argument.meta[_NOTE] = count


def example_ids(sizes: list[int], choices: int) -> Tensor:
    """Ids of which each row has others, and that are every choice where there are rows enough."""
    return (torch.arange(torch.Size(sizes).numel()) % choices).view(sizes)


def selection(ids: fx.Node) -> fx.Node | None:
    """The node that selects, where ids are what it gives."""
    source = _source(ids)
    return source if source.target in _SELECTIONS else None


def _source(ids: fx.Node) -> fx.Node:
    while ids.target in _SAME_IDS and isinstance(ids.args[0], fx.Node):
        ids = ids.args[0]
    return ids


def _known_choices(ids: fx.Node) -> int | None:
    """How many values the graph, or a note of another, shows that ids can have."""
    source = _source(ids)
    if source.target not in _SELECTIONS:
        return source.meta.get(_NOTE)
    scores = value(source.args[0])  # type: ignore[arg-type]
    dim = schema_arguments(source).get("dim", -1)
    size = scores.shape[-1 if dim is None else dim]
    return size if isinstance(size, int) else None


def _may_be_ids(node: fx.Node) -> bool:
    return value(node).dtype in (torch.int32, torch.int64)
