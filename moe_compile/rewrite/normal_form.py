"""One spelling for every operation, so that a pattern has to know only one.

Each rule is a function of a node that returns the node to use in its place, or None; it may only
change how a value is spelled, never the value. Rules run until none applies.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from moe_compile.capture.boundary import enter, exit
from moe_compile.kernels.grouped_mm import grouped_mm

aten = torch.ops.aten

Rule = Callable[[fx.Node], fx.Node | None]

_IDENTITIES = {aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default}
_CASTS = {
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
}
_RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten._reshape_alias.default,
    aten.view_as.default,
    aten.reshape_as.default,
}
_TRANSPOSES = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.swapaxes.default,
    aten.movedim.int,
}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes}
_VIEWS = _RESHAPES | _TRANSPOSES | {aten.slice.Tensor, aten.expand.default, aten.unsqueeze.default}
_RENAMES: dict[Any, Any] = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.negative.default: aten.neg.default,
    aten.concat.default: aten.cat.default,
    aten.clip.default: aten.clamp.default,
}


def normalize(graph: fx.Graph) -> int:
    """Rewrites a functional aten graph to its normal form; returns how many nodes changed."""
    changed = 0
    while step := _sweep(graph):
        changed += step
    return changed


def is_normal(graph: fx.Graph) -> bool:
    """Whether no rule would change the graph."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return normalize(copy) == 0


def schema_arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by name, with the defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    given = dict(zip(positional, node.args, strict=False)) | dict(node.kwargs)
    return {
        a.name: given.get(a.name, a.default_value)
        for a in schema.arguments
        if a.name in given or a.has_default_value()
    }


def schema_names(node: fx.Node) -> list[str]:
    """The names of the operator's arguments, in order; none for a function without a schema."""
    schema = getattr(node.target, "_schema", None)
    return [] if schema is None else [argument.name for argument in schema.arguments]


def is_aten(node: fx.Node) -> bool:
    """Whether the node calls an operator with a schema."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers: dropout that is on, or a random operator."""
    if not is_aten(node):
        return False
    arguments = schema_arguments(node)
    if node.target is aten.scaled_dot_product_attention.default:
        return arguments["dropout_p"] != 0
    if node.target is aten.dropout.default:
        return arguments["train"] and arguments["p"] != 0
    return torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]


def value(node: fx.Node) -> Any:
    """The node's fake value."""
    return node.meta["val"]


def _sweep(graph: fx.Graph) -> int:
    changed = 0
    for node in list(graph.nodes):
        for replacement in _replacements(node):
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            changed += 1
            break
    for node in reversed(list(graph.nodes)):
        if _dead(node):
            graph.erase_node(node)
            changed += 1
    return changed


def _replacements(node: fx.Node) -> Iterator[fx.Node]:
    if not node.users:
        return
    for rule in _rules(node):
        replacement = rule(node)
        if replacement is not None:
            yield replacement


def _dead(node: fx.Node) -> bool:
    if node.users or node.op in ("placeholder", "output") or node.target in (enter, exit):
        return False
    if node.op == "get_attr":
        return True
    return not (is_aten(node) and _has_effect(node))


def _has_effect(node: fx.Node) -> bool:
    operator: Any = node.target
    return operator._schema.is_mutable or is_random(node)


def _rules(node: fx.Node) -> Iterator[Rule]:
    if node.target is operator.getitem and _target_of(node.args[0]) in _SPLITS:
        yield _split_as_slice
    if not is_aten(node):
        return
    for targets, rule in _TABLE:
        if node.target in targets:
            yield rule
    yield _canonical_arguments


def _target_of(node: Any) -> Any:
    return node.target if isinstance(node, fx.Node) else None


def _new(node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, kwargs)
    new.meta = dict(node.meta)
    return new


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _identity(node: fx.Node) -> fx.Node | None:
    return None if _is_returned(node) else _input(node)


def _crosses(node: fx.Node) -> bool:
    """Whether a module is called with the value or returns it: the other side has nothing else."""
    return any(user.target in (enter, exit) for user in node.users)


def _is_returned(node: fx.Node) -> bool:
    """Whether a module returns the value or a view of it.

    Its copies then stay: the caller may take a view of what it gets, or change it in place.
    """
    return any(
        user.target is exit or (user.target in _VIEWS and _is_returned(user)) for user in node.users
    )


def _cast(node: fx.Node) -> fx.Node | None:
    source, target = value(_input(node)), value(node)
    if source.device != target.device:
        return None
    if source.dtype == target.dtype:
        return _input(node)
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return None
    return _new(node, aten.to.dtype, _input(node), target.dtype)


def _reshape(node: fx.Node) -> fx.Node | None:
    source = _input(node)
    if _same_shape(value(source), value(node)):
        return source
    while not _crosses(source) and (
        _target_of(source) is aten.reshape.default
        or (_target_of(source) is aten.clone.default and not _is_returned(node))
    ):
        source = _input(source)  # a reshape copies where it must: a copy before it adds nothing
    shape = _shape_argument(node)
    if node.target is aten.reshape.default and source is node.args[0] and shape == node.args[1]:
        return None
    return _new(node, aten.reshape.default, source, shape)


def _shape_argument(node: fx.Node) -> Any:
    """The target shape: as it was given, or else the sizes of the value."""
    if node.target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        return list(node.args[1])  # type: ignore[arg-type]
    sizes = list(value(node).shape)
    symbolic = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(symbolic) == 1:
        sizes[symbolic[0]] = -1
        return sizes
    return sizes if not symbolic else _sized_like(node, sizes)


def _sized_like(node: fx.Node, sizes: list[Any]) -> list[Any]:
    """Symbolic sizes as nodes that read them off the input."""
    source = _input(node)
    named = {str(size): i for i, size in enumerate(value(source).shape)}
    for i, size in enumerate(sizes):
        if not isinstance(size, int) and str(size) in named:
            sizes[i] = _new(node, aten.sym_size.int, source, named[str(size)])
            sizes[i].meta["val"] = size
    missing = [i for i, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
    assert len(missing) <= 1, "a reshape keeps all but one of its symbolic sizes"
    for i in missing:
        sizes[i] = -1
    return sizes


def _transpose(node: fx.Node) -> fx.Node | None:
    source = _input(node)
    order = _permutation(node)
    moved = [i for i, dim in enumerate(order) if i != dim]
    if not moved:
        return source
    if len(moved) == 2:
        if node.target is aten.transpose.int and tuple(node.args[1:]) == tuple(moved):
            return None
        return _new(node, aten.transpose.int, source, *moved)
    if node.target is aten.permute.default and node.args[1] == order:
        return None
    return _new(node, aten.permute.default, source, order)


def _permutation(node: fx.Node) -> list[int]:
    """Where each output dimension comes from, found by moving labels."""
    rank = value(_input(node)).dim()
    labels = torch.empty(tuple(range(2, rank + 2)), device="meta")
    moved = node.target(labels, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return [size - 2 for size in moved.shape]


def _split_as_slice(node: fx.Node) -> fx.Node | None:
    split, index = _input(node), node.args[1]
    arguments = schema_arguments(split)
    source, dim = _input(split), int(arguments["dim"]) % value(_input(split)).dim()
    sizes = [part.shape[dim] for part in value(split)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    assert isinstance(index, int)
    start = sum(sizes[:index])
    return _new(node, aten.slice.Tensor, source, dim, start, start + sizes[index])


def _slice(node: fx.Node) -> fx.Node | None:
    if _same_shape(value(_input(node)), value(node)):
        return _input(node)
    arguments = schema_arguments(node)
    source = value(_input(node))
    dim = arguments["dim"] % source.dim()
    size, start, end = source.shape[dim], arguments["start"] or 0, arguments["end"]
    if not all(isinstance(part, int) for part in (size, start)):
        return None
    end = size if end is None else end
    if not isinstance(end, int):
        return None
    start, end = (min(max(p + size if p < 0 else p, 0), size) for p in (start, end))
    step = [] if arguments["step"] == 1 else [arguments["step"]]
    wanted = (_input(node), dim, start, end, *step)
    return None if node.args == wanted and not node.kwargs else _new(node, node.target, *wanted)


def _expand(node: fx.Node) -> fx.Node | None:
    return _input(node) if _same_shape(value(_input(node)), value(node)) else None


def _dropout(node: fx.Node) -> fx.Node | None:
    arguments = schema_arguments(node)
    return _input(node) if arguments["p"] == 0 or not arguments["train"] else None


def _copy(node: fx.Node) -> fx.Node | None:
    """`copy(target, source)` is the source in the target's dtype and shape."""
    target, source = node.args[:2]
    assert isinstance(target, fx.Node)
    assert isinstance(source, fx.Node)
    if value(source).dtype != value(node).dtype:
        source = _new(node, aten.to.dtype, source, value(node).dtype)
    if not _same_shape(value(source), value(node)):
        sizes = _sized_like(node, list(value(node).shape))
        source = _new(node, aten.expand.default, source, sizes)
    return _new(node, aten.clone.default, source) if _is_returned(node) else source


def _square(node: fx.Node) -> fx.Node | None:
    return _new(node, aten.pow.Tensor_Scalar, _input(node), 2)


def _reversed_sub(node: fx.Node) -> fx.Node | None:
    arguments = schema_arguments(node)
    if arguments["alpha"] != 1 or not isinstance(arguments["other"], fx.Node):
        return None
    return _new(node, aten.sub.Tensor, arguments["other"], arguments["self"])


def _floor_division(node: fx.Node) -> fx.Node | None:
    if schema_arguments(node)["rounding_mode"] != "floor":
        return None
    return _new(node, aten.floor_divide.default, *node.args[:2])


def _grouped(node: fx.Node) -> fx.Node | None:
    arguments = schema_arguments(node)
    x, weight, offs = list(arguments.values())[:3]
    return _new(node, grouped_mm._opoverload, x, weight, offs)


def _rename(node: fx.Node) -> fx.Node | None:
    arguments = schema_arguments(node)
    alpha = arguments.pop("alpha", 1)  # positional here, a keyword in the operator's other name
    scaled = {} if alpha == 1 else {"alpha": alpha}
    return _new(node, _RENAMES[node.target], *arguments.values(), **scaled)


def _canonical_arguments(node: fx.Node) -> fx.Node | None:
    """Positional where the schema allows, defaults left out, dimensions counted from the front."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = schema_arguments(node)
    args, kwargs = list[Any](), dict[str, Any]()
    for argument in schema.arguments:
        known = _from_front(node, argument.name, given.get(argument.name))
        default = argument.default_value if argument.has_default_value() else _NO_DEFAULT
        if argument.kwarg_only:
            if not _equal(known, default) and argument.name != "pin_memory":
                kwargs[argument.name] = known
        else:
            args.append((known, default))
    while args and _equal(*args[-1]):
        args.pop()
    wanted = tuple(known for known, _ in args)
    if _equal(tuple(node.args), wanted) and dict(node.kwargs) == kwargs:
        return None
    return _new(node, node.target, *wanted, **kwargs)


class _NoDefault:
    """Stands for a missing default; equal to nothing else."""


_NO_DEFAULT = _NoDefault()


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_equal, left, right))
    return type(left) is type(right) and bool(left == right)


def _from_front(node: fx.Node, name: str, argument: Any) -> Any:
    if name not in ("dim", "dims") or argument is None or node.target is aten.tile.default:
        return argument  # what `tile` calls dims are repeats
    rank = _rank(node)
    if isinstance(argument, int):
        return argument % rank if rank else argument
    if isinstance(argument, (list, tuple)) and all(isinstance(dim, int) for dim in argument):
        return [dim % rank if rank else dim for dim in argument]
    return argument


def _rank(node: fx.Node) -> int:
    """The rank that the node's dimensions count in."""
    first = node.args[0]
    first = first[0] if isinstance(first, (list, tuple)) else first
    if not isinstance(first, fx.Node) or not isinstance(value(first), Tensor):
        return 0
    grows = node.target in (aten.unsqueeze.default, aten.stack.default)
    return value(first).dim() + grows


def _same_shape(left: Tensor, right: Tensor) -> bool:
    """Whether two symbolic shapes are the same expression (no guard is added)."""
    return [str(size) for size in left.shape] == [str(size) for size in right.shape]


_TABLE: tuple[tuple[Any, Rule], ...] = (
    (_IDENTITIES, _identity),
    (_CASTS, _cast),
    (_RESHAPES, _reshape),
    (_TRANSPOSES, _transpose),
    ({aten.slice.Tensor}, _slice),
    ({aten.expand.default}, _expand),
    ({aten.dropout.default}, _dropout),
    ({aten.copy.default}, _copy),
    ({aten.square.default}, _square),
    ({aten.rsub.Tensor}, _reversed_sub),
    ({aten.div.Tensor_mode}, _floor_division),
    ({aten._grouped_mm.default}, _grouped),
    (set(_RENAMES), _rename),
)
