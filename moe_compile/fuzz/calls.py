"""Writes the pieces that several loops share."""

from moe_compile.fuzz.experts import stacked_lines
from moe_compile.fuzz.spec import BlockSpec
from moe_compile.fuzz.storage import Place

FLAT_WEIGHTS = "weights.reshape(-1)"


def expert_lines(spec: BlockSpec, index: str, x: str) -> list[str]:
    """From `x` to `rows` by the expert of a number."""
    if spec.look_alike == "shared_pairs":
        index = f"{index} // 2"
    if spec.look_alike == "neighbour" and spec.listed:
        index = f"({index} + 1) % self.num_experts"
    if spec.enumerated:
        return [f"rows = layer({x})"]
    if spec.storage == "module_list":
        return [f"rows = self.experts[{index}]({x})"]
    if spec.storage == "module_dict":
        return [f'rows = self.experts[f"expert_{{{index}}}"]({x})']
    if x.isidentifier():
        return stacked_lines(spec, Place("one", index), x)
    return [f"current = {x}", *stacked_lines(spec, Place("one", index), "current")]


def every_expert(spec: BlockSpec) -> str:
    """The head of a loop over all experts."""
    if spec.enumerated:
        return "for expert, layer in enumerate(self.experts):"
    start = "1, " if spec.look_alike == "skipped" else ""
    return f"for expert in range({start}self.num_experts):"


def picks(spec: BlockSpec) -> str:
    """The sizes of the picks, T and K."""
    return f"ids.shape[0], {spec.top_k}"


def sum_of_picks(spec: BlockSpec) -> str:
    """The method call that sums [T, K, H] over picks."""
    named = {"product": "prod(dim=1)", "maximum": "amax(dim=1)"}
    return named.get(spec.look_alike, "sum(dim=1)")


def without_zero_experts(spec: BlockSpec) -> list[str]:
    """Picks of zero-computation experts become picks of the first, with a weight of zero."""
    if not spec.zero_experts:
        return []
    return [
        "weights = weights.masked_fill(ids >= self.num_experts, 0.0)",
        "ids = ids.masked_fill(ids >= self.num_experts, 0)",
    ]
