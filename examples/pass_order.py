"""Drop, move, insert and replace passes, and see what each order gives.

python examples/pass_order.py

A pass declares the facts that it needs, gives and breaks. An order in which they do not hold is
refused when it is written down, before any model is touched.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import moe_compile
from moe_compile import PIPELINE, OptimizeConfig, Pass, Pipeline
from moe_compile.ops import OPS
from moe_compile.passes.facts import PLANNED
from moe_compile.rewrite.unit_graph import UnitGraph

STEPS = 5


@dataclass(frozen=True)
class UseReference(Pass):
    """Run one canonical op as the plain torch code that defines it: what does its provider buy?"""

    name = "use_reference"
    needs = frozenset({PLANNED})
    op: str = "experts"

    def run(self, unit: UnitGraph) -> int:
        nodes = [node for node in unit.graph.nodes if node.target is OPS[self.op]]
        for node in nodes:
            node.meta["provider"] = "reference"
            node.meta["implementation"] = OPS[self.op].reference
        return len(nodes)


def moved(pipeline: Pipeline, name: str, after: str) -> Pipeline:
    """The same passes with one of them in another place."""
    return pipeline.without(name).after(after, pipeline[name])


SLOW_EXPERTS = PIPELINE.after("choose_providers", UseReference("experts"))
ORDERS = {
    "default": PIPELINE,
    "norms dropped": PIPELINE.without("raise_norms"),
    "experts last": moved(PIPELINE, "raise_experts", after="raise_mlps"),
    "reference experts inserted": SLOW_EXPERTS,
    "replaced by reference norms": SLOW_EXPERTS.replace("use_reference", UseReference("rms_norm")),
}
ILLEGAL: dict[str, Callable[[], Pipeline]] = {
    "lower without a plan": lambda: PIPELINE.without("choose_providers"),
    "norms after lowering": lambda: moved(PIPELINE, "raise_norms", after="lower"),
    "a reference before the plan": lambda: PIPELINE.before("raise_norms", UseReference()),
}


def build() -> PreTrainedModel:
    """Two layers of 16 experts with random weights, the same ones every time."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()


def step_milliseconds(model: PreTrainedModel) -> tuple[float, float]:
    """The loss of the first training step, and the median time of a forward and backward."""
    ids = torch.arange(512).reshape(4, 128)
    losses: list[float] = []
    times: list[float] = []
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    return losses[0], statistics.median(times[1:]) * 1e3


def main() -> None:
    for title, write in ILLEGAL.items():
        try:
            write()
        except ValueError as error:
            print(f"refused: {title}: {error}")
    config = OptimizeConfig(compile=False)
    print(f"\n{'order':28} {'modules':>7} {'ops':>4} {'nodes':>6} {'loss':>8} {'step':>8}")
    for title, order in {"as it was": None, **ORDERS}.items():
        model = build()
        modules = ops = nodes = 0
        if order is not None:
            moe_compile.optimize(model, config=config, passes=order)
            report = moe_compile.report(model)
            modules = sum(site.layers for site in report.sites if site.status == "rewritten")
            ops = next(step.changed for step in report.passes if step.name == "lower")
            nodes = report.passes[-1].nodes_after
        loss, milliseconds = step_milliseconds(model)
        print(f"{title:28} {modules:7} {ops:4} {nodes:6} {loss:8.4f} {milliseconds:5.0f} ms")


if __name__ == "__main__":
    main()
