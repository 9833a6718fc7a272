"""The norm of each head, then its rotary embedding, with the heads moved in between or not.

before:  rotary(rms_norm(x, weight, eps).transpose(1, 2), cos, sin)
after:   normed_rotary(x.transpose(1, 2), weight, cos, sin, eps)

Of canonical ops, in any of whose spellings it is found: those are raised first.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from moe_compile import ops
from moe_compile.rewrite.matcher import check_escapes
from moe_compile.rewrite.normal_form import aten, schema_arguments, value
from moe_compile.rewrite.pattern import Match, Pattern
from moe_compile.rewrite.refuse import Refuse


class NormedRotary(Pattern):
    """Queries and keys of Qwen3 and of others that norm them by heads."""

    name = "normed_rotary"
    kind = "rope"
    shapes = {"x": (2, 4, 4, 8), "weight": (8,), "cos": (2, 1, 4, 4), "sin": (2, 1, 4, 4)}

    @staticmethod
    def before(
        x: Tensor,
        weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        offset: float,
        *,
        cast_first: bool,
        interleaved: bool,
        swapped: bool,
    ) -> Tensor:
        """Two ops; the heads may be `swapped` with the tokens after the norm."""
        normed = ops.rms_norm(x, weight, eps, cast_first=cast_first, offset=offset)
        normed = torch.ops.aten.transpose.int(normed, 1, 2) if swapped else normed
        return ops.rotary(normed, cos, sin, interleaved=interleaved)

    @staticmethod
    def after(
        x: Tensor,
        weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        offset: float,
        *,
        cast_first: bool,
        interleaved: bool,
        swapped: bool,
    ) -> Tensor:
        """A norm of the last dimension does not ask for the order of the others."""
        x = torch.ops.aten.transpose.int(x, 1, 2) if swapped else x
        form: dict[str, bool] = {"cast_first": cast_first, "interleaved": interleaved}
        return ops.normed_rotary(x, weight, cos, sin, eps, offset=offset, **form)

    def find(self, graph: fx.Graph) -> Iterator[Match]:
        """The matches whose inner values nobody else needs; the caller may rewrite each."""
        for node in [n for n in graph.nodes if n.target is ops.rotary]:
            match = self._match_at(node)
            try:
                if match is not None:
                    check_escapes(match)
                    yield match
            except Refuse:
                continue  # two ops, which are as right

    def _match_at(self, root: fx.Node) -> Match | None:
        turned: dict[str, Any] = ops.rotary.arguments(*root.args, **root.kwargs)
        norm: Any = turned["x"]
        swapped = _swaps_heads(norm)
        nodes = {root, norm}
        if swapped:
            norm = norm.args[0]
            nodes.add(norm)
        if norm.target is not ops.rms_norm:
            return None
        given: dict[str, Any] = ops.rms_norm.arguments(*norm.args, **norm.kwargs)
        choice = {
            "cast_first": given.pop("cast_first"),
            "interleaved": turned["interleaved"],
            "swapped": swapped,
        }
        bindings = given | {name: turned[name] for name in ("cos", "sin")}
        return Match(self, bindings, choice, root, frozenset(nodes))


def _swaps_heads(node: fx.Node) -> bool:
    """Whether it exchanges the second and the third of four dimensions."""
    if node.target is not aten.transpose.int or value(node).dim() != 4:
        return False
    moved = schema_arguments(node)
    return {moved["dim0"] % 4, moved["dim1"] % 4} == {1, 2}
