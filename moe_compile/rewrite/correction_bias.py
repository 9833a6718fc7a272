"""A router's correction bias: added to the scores for the choice of experts, not for their weights.

    chosen = topk(scores + bias).indices;  weights = scores.gather(chosen)

It is found by where its values go, never by its name: into an addition whose result reaches the
ids of the picks, but reaches their weights through these ids alone.

Source: auxiliary-loss-free load balancing (arXiv:2408.15664), as in DeepSeek-V3.
"""

from collections.abc import Callable

from torch import fx

from moe_compile.capture.boundary import enter, exit
from moe_compile.rewrite.normal_form import aten

_ADDITIONS = (aten.add.Tensor,)
_SAME_VALUES = (
    aten._to_copy.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
)


def correction_bias(ids: fx.Node, weights: fx.Node, num_experts: int) -> str | None:
    """The name of the tensor that corrects the choice `ids`, with `weights`; None if none does."""
    for_choice, for_weights = _sources(ids, _always), _sources(weights, _is_floating)
    found = [
        str(node.target)
        for node in for_choice
        if node.op == "get_attr"
        and node not in for_weights
        and _is_floating(node)
        and node.meta["val"].numel() == num_experts
        and _is_added(node)
    ]
    return found[0] if len(found) == 1 else None


def _sources(node: fx.Node, crosses: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """All that a node is computed from, by way of nodes that `crosses` accepts."""
    seen, open_ = set[fx.Node](), [node]
    while open_:
        node = open_.pop()
        if node not in seen and crosses(node):
            seen.add(node)
            open_.extend(node.all_input_nodes)
    return seen


def _always(_: fx.Node) -> bool:
    return True


def _is_floating(node: fx.Node) -> bool:
    """Whether a node has real numbers: indices and masks carry a choice, but no scores."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return True  # the item that is taken decides
    return getattr(getattr(value, "dtype", None), "is_floating_point", False)


def _is_added(node: fx.Node) -> bool:
    """Whether every use of a node's values is an addition; that a module is given it is none."""
    users = [user for user in node.users if user.target not in (enter, exit)]
    return bool(users) and all(
        user.target in _ADDITIONS or (user.target in _SAME_VALUES and _is_added(user))
        for user in users
    )
