"""Which products of a layer become eight-bit, which stay, and what is said of both."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import moe_compile
from moe_compile import ops
from moe_compile.passes import (
    PIPELINE,
    ChooseProviders,
    DispatchExperts,
    Lower,
    Normalize,
    QuantizeToFP8,
    RaiseExperts,
    RaiseMLPs,
)
from moe_compile.passes.facts import EXPERTS_PLACED, NORMALIZED
from moe_compile.rewrite.unit_graph import UnitGraph
from tests.counting import CountOps
from tests.families import qwen3_moe
from tests.passes.test_dispatch_experts import TWO
from tests.patterns.harness import SEQUENCE, capture, normal, op_names
from tests.patterns.idioms import EXPERTS, grouped_experts

QUANTIZED = PIPELINE.before("choose_providers", QuantizeToFP8())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(normal(EXPERTS, 32, 16))
        self.down = nn.Parameter(normal(EXPERTS, 16, 16))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return grouped_experts(x, ids, weights, self.up, self.down)


class MLP(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, width), nn.Linear(16, width)
        self.down = nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.odd = nn.Linear(16, 16), nn.Linear(16, 8)
        self.hidden, self.router = nn.Linear(16, 32), nn.Linear(32, EXPERTS)
        self.experts, self.mlp = Experts(), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.odd(x).repeat(1, 2)
        weights, ids = self.router(self.hidden(x).relu()).softmax(-1).topk(2)
        return self.experts(x, ids, weights) + self.mlp(x)


def placed(layer: nn.Module | None = None, name: str = "layers.0") -> UnitGraph:
    unit = capture(layer or Layer(), normal(SEQUENCE, 16))
    unit.name = name
    for step in (Normalize(), RaiseExperts(), RaiseMLPs(), DispatchExperts()):
        step.run(unit)
    return unit


def test_its_facts() -> None:
    assert QuantizeToFP8.needs == {NORMALIZED, EXPERTS_PLACED}
    assert not QuantizeToFP8.exact
    with pytest.raises(ValueError, match="needs the fact 'experts_placed'"):
        PIPELINE.before("raise_experts", QuantizeToFP8())
    with pytest.raises(ValueError, match="got recipe='delayed'; it takes 'current', a scale for"):
        QuantizeToFP8("delayed")  # type: ignore[arg-type]


def test_products_become_eight_bit() -> None:
    unit = placed()
    assert QuantizeToFP8().run(unit) == 3
    unit.graph.lint()
    assert op_names(unit).count("fp8_linear") == 4
    assert op_names(unit).count("linear") == 3
    assert "gated_mlp" not in op_names(unit)
    (experts,) = [n for n in unit.graph.nodes if n.target is ops.experts]
    assert experts.kwargs["recipe"] == "current"
    assert unit.not_quantized == {
        "odd": "FP8 products take sizes that are multiples of 16: its weight is 8 x 16",
        "hidden": "it routes tokens",
        "router": "it routes tokens",
    }


class WithLoss(Layer):
    """Its router's scores also have a loss."""

    def forward(self, x: Tensor) -> Any:
        scores = self.router(self.hidden(x).relu())
        weights, ids = scores.softmax(-1).topk(2)
        return self.experts(x, ids, weights) + self.mlp(self.first(x)), scores.logsumexp(
            -1
        ).square().mean()


def test_a_router_whose_scores_have_a_loss_stays() -> None:
    unit = placed(WithLoss())
    assert QuantizeToFP8().run(unit) == 4
    assert unit.not_quantized == {"router": "it routes tokens"}


def test_a_gated_mlp_of_which_a_part_is_refused_stays() -> None:
    unit = placed(Layer(width=24))
    assert QuantizeToFP8().run(unit) == 2
    unit.graph.lint()
    assert "gated_mlp" in op_names(unit)
    assert unit.not_quantized["mlp"].endswith("its weight is 24 x 16")


def test_what_was_noted_of_the_whole_layer_holds_for_its_parts() -> None:
    unit = placed()
    unit.not_quantized = {"first": "it routes tokens", "mlp": "it routes tokens"}
    assert QuantizeToFP8().run(unit) == 1
    assert op_names(unit).count("fp8_linear") == 0


def test_blocks_want_larger_sizes() -> None:
    unit = placed()
    assert QuantizeToFP8("blockwise").run(unit) == 0
    assert unit.not_quantized["first"].endswith("multiples of 128: its weight is 16 x 16")
    assert unit.not_quantized["experts"].endswith("multiples of 128: its weight is 32 x 16")


def test_what_is_beside_the_layers_stays() -> None:
    unit = placed(name="lm_head")
    assert QuantizeToFP8().run(unit) == 0
    assert unit.not_quantized == {}


def test_experts_on_several_ranks_are_quantised_where_they_are() -> None:
    unit = capture(Layer(), normal(SEQUENCE, 16))
    unit.name, unit.ep = "layers.0", TWO
    steps = RaiseExperts(), DispatchExperts(), QuantizeToFP8(), ChooseProviders(), Lower()
    for step in (Normalize(), *steps):
        step.run(unit)
    (experts,) = [n for n in unit.graph.nodes if n.meta.get("op") is ops.experts]
    assert experts.kwargs["recipe"] == "current"
    assert experts.meta["numerics"] == "fp8 current"
    assert "router" in unit.not_quantized


def test_a_gpu_without_fp8_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = placed()
    for node in unit.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            with node.meta["val"].fake_mode:
                node.meta["val"] = torch.empty_like(node.meta["val"], device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older one")
    with pytest.raises(ValueError, match=r"got an older one, of compute capability 8.0; it takes"):
        QuantizeToFP8().run(unit)


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    config = qwen3_moe(num_hidden_layers=2, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def loss(module: nn.Module) -> Tensor:
    ids = torch.arange(40).view(2, 20) * 37 % 128
    return module(input_ids=ids, labels=ids).loss


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"verify": "full", "compile": {"backend": "aot_eager"}}])
def test_a_model_trains_with_it_and_its_report_says_so(options: dict[str, Any]) -> None:
    config = moe_compile.OptimizeConfig(autocast=False, **options)
    exact, quantized = model(), moe_compile.optimize(model(), config=config, passes=QUANTIZED)
    report = moe_compile.report(quantized)
    changed = {s.module: s for s in report.sites if s.numerics}
    assert {s.kind for s in changed.values()} == {"linear", "mlp", "experts"}
    assert all(s.numerics == "fp8 current" and s.tolerance == 0.25 for s in changed.values())
    assert all(s.error is not None and 0.01 < s.error < 0.25 for s in changed.values())
    assert "model.layers.1.mlp.experts" in changed
    assert report.not_quantized == {"model.layers.1.mlp.gate": "it routes tokens"}
    assert "NOT EXACT: fp8 current in " in str(report)
    assert "Not quantised: model.layers.1.mlp.gate; it routes tokens." in str(report)
    assert report.to_json()["not_quantized"] == report.not_quantized
    first, second = loss(exact), loss(quantized)
    assert 0 < abs(first.item() - second.item()) < 1e-2
    second.backward()
    first.backward()
    pairs = zip(exact.named_parameters(), quantized.named_parameters(), strict=True)
    for (name, a), (other, b) in pairs:
        assert name == other
        assert a.grad is not None
        assert b.grad is not None
        assert b.dtype == b.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 0.5 * a.grad.norm(), name


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, {"backend": "aot_eager"}])
def test_recomputing_keeps_its_products(compiled: Any) -> None:
    config: dict[str, Any] = {"autocast": False, "compile": compiled, "verify": "off"}
    names, found = ("moe_compile::fp8_mm", "moe_compile::fp8_grouped_mm"), list[list[int]]()
    for mode in ("none", "selective", "full"):
        options = moe_compile.OptimizeConfig(**config, activation_checkpointing=mode)
        quantized = moe_compile.optimize(model(), config=options, passes=QUANTIZED)
        with CountOps() as ops_run:
            loss(quantized).backward()
        found.append([ops_run.calls[name] for name in names])
    none, selective, full = found
    assert none == selective
    assert all(more > fewer for more, fewer in zip(full, none, strict=True))


def test_what_is_exact_is_still_held_to_it() -> None:
    quantized = moe_compile.optimize(model(), passes=QUANTIZED)
    norms = [s for s in moe_compile.report(quantized).sites if s.kind == "rms_norm"]
    assert norms
    assert all(s.error is None and s.tolerance == 0.0 for s in norms)


def test_an_error_beyond_the_tolerance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantizeToFP8, "tolerance", 0.02)
    report = moe_compile.explain(model(), passes=QUANTIZED)
    linears = [s for s in report.sites if s.kind == "linear"]
    assert {s.status for s in linears} == {"refused"}
    assert "verification failed: the rewrite has an error of" in str(linears[0].reason)
