import copy
import functools
import gc
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moe_compile
from moe_compile import OptimizeConfig
from tests.families import build
from tests.pairs import Pair, check_close, error, inputs, make_pair, pair, step, token_ids
from tests.trainers import trainer_losses
from tests.trl_trainer import trl_losses

FAMILY = "qwen3_moe"
SHALLOW: dict[str, Any] = {"num_hidden_layers": 2}
DEEP: dict[str, Any] = {"num_hidden_layers": 12}


def eager() -> Pair:
    return pair(FAMILY, **SHALLOW)


def compiled() -> Pair:
    return pair(FAMILY, compiled=True, **DEEP)


@pytest.fixture(params=["eager", "compiled"])
def both(request: pytest.FixtureRequest) -> Pair:
    return {"eager": eager, "compiled": compiled}[request.param]().copies()


@pytest.fixture
def few_recompiles() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        yield


def generate(model: Any) -> Tensor:
    prompt = token_ids(2, 6)
    return model.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
    )


def test_the_class_the_signature_and_the_names_stay() -> None:
    models = eager()
    assert isinstance(models.optimized, type(models.original))
    assert inspect.signature(models.optimized.forward) == inspect.signature(models.original.forward)
    assert list(models.optimized.state_dict()) == list(models.original.state_dict())
    names = [name for name, _ in models.original.named_parameters()]
    assert [name for name, _ in models.optimized.named_parameters()] == names
    assert [name for name, _ in models.optimized.named_modules()] == [
        name for name, _ in models.original.named_modules()
    ]


def test_every_layer_keeps_its_signature() -> None:
    models = eager()
    for name, module in models.original.named_modules():
        mine = models.optimized.get_submodule(name).forward
        assert inspect.signature(mine) == inspect.signature(module.forward), name


def test_generate_with_a_cache(both: Pair) -> None:
    assert torch.equal(generate(both.optimized), generate(both.original))


@pytest.mark.usefixtures("few_recompiles")
def test_twelve_layers_do_not_hit_a_recompile_limit(caplog: pytest.LogCaptureFixture) -> None:
    models = compiled().copies()
    for length in (10, 17, 10):
        check_close(
            step(models.optimized, **inputs(length=length)),
            step(models.original, **inputs(length=length)),
        )
    for model in (models.original, models.optimized):
        model.eval()
    with torch.no_grad():
        check_close(
            {"logits": models.optimized(token_ids(1, 13), use_cache=False).logits},
            {"logits": models.original(token_ids(1, 13), use_cache=False).logits},
        )
    assert torch.equal(generate(models.optimized), generate(models.original))
    assert "uncompiled" not in caplog.text


def test_the_router_logits_and_the_auxiliary_loss(both: Pair) -> None:
    call = inputs() | {"output_router_logits": True}
    mine, theirs = both.optimized(**call), both.original(**call)
    assert error(mine.aux_loss, theirs.aux_loss) < 1e-6
    assert len(mine.router_logits) == len(theirs.router_logits) > 0
    for left, right in zip(mine.router_logits, theirs.router_logits, strict=True):
        assert error(left, right) < 1e-5
    check_close(step(both.optimized, **call), step(both.original, **call))


def test_recording_can_stop(caplog: pytest.LogCaptureFixture) -> None:
    models = compiled().copies()
    gc.collect()  # the layers of other tests
    models.optimized(**inputs(), output_router_logits=True)
    check_close(step(models.optimized, **inputs()), step(models.original, **inputs()))
    assert "uncompiled" not in caplog.text


@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_hidden_states_and_the_attention_weights(is_compiled: bool) -> None:
    models = pair("gpt_oss", compiled=is_compiled)
    call = inputs() | {"output_hidden_states": True, "output_attentions": True}
    mine, theirs = models.optimized(**call), models.original(**call)
    for name in ("hidden_states", "attentions"):
        values, references = getattr(mine, name), getattr(theirs, name)
        assert len(values) == len(references) > 0
        for value, reference in zip(values, references, strict=True):
            assert value is not None, name
            assert error(value, reference) < 1e-5


def calls_of(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_gradient_checkpointing_recomputes(both: Pair) -> None:
    expected = step(both.original, **inputs())
    both.optimized.gradient_checkpointing_enable()
    calls = calls_of(both.optimized.model.layers[1])
    check_close(step(both.optimized, **inputs()), expected)
    assert len(calls) == 2


def test_gradient_checkpointing_can_be_switched_off(both: Pair) -> None:
    both.optimized.gradient_checkpointing_enable()
    both.optimized.gradient_checkpointing_disable()
    calls = calls_of(both.optimized.model.layers[1])
    step(both.optimized, **inputs())
    assert len(calls) == 1


def test_a_deep_copy_uses_its_own_weights(both: Pair) -> None:
    copied = both.copies().optimized
    before = both.optimized(token_ids()).logits.detach()
    assert torch.equal(copied(token_ids()).logits, before)
    for name, parameter in copied.named_parameters():
        self_before = copied(token_ids()).logits.detach()
        with torch.no_grad():
            parameter.mul_(1.5)
        assert not torch.equal(copied(token_ids()).logits, self_before), name
    assert torch.equal(both.optimized(token_ids()).logits, before)
    both.original.load_state_dict(copied.state_dict())
    check_close(step(copied, **inputs()), step(both.original, **inputs()))


LORA: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "dense_mlp": {"target_modules": r".*mlp\.(gate|up|down)_proj"},
    "experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


# PEFT turns a model's fused experts into patterns and warns when nothing matches them.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")


def with_lora(model: Any, target: str) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.0, **LORA[target]))


def fill_lora(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def check_lora(optimized: Any, original: Any) -> None:
    base = original(token_ids()).logits
    for model in (optimized, original):
        fill_lora(model)
    expected = step(original, **inputs())
    assert error(expected["logits"], base) > 1e-2
    # Of twelve layers in float32, the gradients of either are 2e-5 from float64's.
    check_close(step(optimized, **inputs()), expected, tolerance=1e-4)


@pytest.mark.parametrize("target", LORA)
def test_lora_added_afterwards(both: Pair, target: str) -> None:
    check_lora(with_lora(both.optimized, target), with_lora(both.original, target))


def test_a_layer_that_cannot_be_traced_says_that_it_runs_uncompiled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = compiled().copies()
    gc.collect()  # the layers of other tests, about which it has been said
    step(models.optimized, **inputs())
    assert "uncompiled" not in caplog.text
    step(with_lora(models.optimized, "experts"), **inputs())
    assert "runs uncompiled: torch.compile cannot trace it: Unsupported" in caplog.text


@pytest.mark.parametrize("target", LORA)
def test_lora_added_before(target: str) -> None:
    model = with_lora(build(FAMILY, **SHALLOW), target)
    models = make_pair(model)
    check_lora(models.optimized, models.original)
    for site in moe_compile.report(models.optimized).sites:
        assert site.status == "rewritten" or site.reason


@pytest.mark.parametrize(
    "losses", [trainer_losses, pytest.param(trl_losses, marks=pytest.mark.matrix)]
)
def test_the_trainers(both: Pair, losses: Callable[[Any], list[float]]) -> None:
    expected = losses(both.original)
    assert len(set(expected)) == 3
    assert losses(both.optimized) == pytest.approx(expected, rel=1e-4)


class Reversed(torch.autograd.Function):
    """Doubles; its backward is on purpose another function's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class ReversedNorm(torch.autograd.Function):
    """A norm that is written as a function; its backward is on purpose another function's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return spelled_norm(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return -gradients[0], gradients[0].sum((0, 1))


def spelled_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Norm(nn.Module):
    """An RMSNorm, with a function outside it, inside it or for it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "the whole norm":
            return ReversedNorm.apply(x, self.weight)
        if self.where == "inside the norm":
            wide = Reversed.apply(x)
            variance = Reversed.apply(wide.pow(2)).mean(-1, keepdim=True)
            return self.weight * (wide * torch.rsqrt(variance + 1e-6))
        return spelled_norm(x, self.weight)


class CustomLayer(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.norm = Norm(where)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(Reversed.apply(self.norm(x)))


class Plain(nn.Module):
    """A model that is no transformers model."""

    def __init__(self, layer: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(layer() for _ in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(ids)
    output.square().sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach()} | named


FUNCTIONS = {
    "beside the norm": {"rewritten"},
    "inside the norm": {"refused"},
    "the whole norm": {"refused"},
}


@pytest.mark.parametrize("where", FUNCTIONS)
@pytest.mark.parametrize("verify", ["off", "auto"])
def test_a_custom_backward_is_kept(where: str, verify: Any) -> None:
    torch.manual_seed(0)
    ids = torch.arange(12).view(2, 6)
    config = OptimizeConfig(verify=verify)
    models = make_pair(Plain(lambda: CustomLayer(where)), config, example_inputs=(ids,))
    norms = [s for s in moe_compile.report(models.optimized).sites if s.kind == "rms_norm"]
    assert {site.status for site in norms} == FUNCTIONS[where]
    check_close(gradients(models.optimized, ids), gradients(models.original, ids))


class ReversedSiLU(nn.Module):
    """An activation whose backward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return Reversed.apply(x) * torch.sigmoid(x)


def test_a_custom_backward_between_the_experts_gemms_is_kept() -> None:
    model = build("mixtral", num_hidden_layers=1)
    model.model.layers[0].mlp.experts.act_fn = ReversedSiLU()
    models = make_pair(model, OptimizeConfig(verify="off"))
    (site,) = [s for s in moe_compile.report(models.optimized).sites if s.kind == "experts"]
    assert site.status == "refused"
    assert "custom autograd function: its backward would be lost" in str(site.reason)
    check_close(step(models.optimized, **inputs()), step(models.original, **inputs()))


def doubled(layer: Any, x: Tensor) -> Tensor:
    return 2 * type(layer).forward(layer, x)


@pytest.mark.parametrize("is_method", [True, False])
def test_a_layer_with_a_forward_of_its_own(is_method: bool) -> None:
    """As accelerate's hooks make them."""
    torch.manual_seed(0)
    ids = torch.arange(12).view(2, 6)
    model = Plain(lambda: CustomLayer("beside the norm"), depth=3)
    layer: Any = model.layers[1]
    own = types.MethodType(doubled, layer) if is_method else functools.partial(doubled, layer)
    layer.forward = own
    original = copy.deepcopy(model)
    config = OptimizeConfig(compile={"backend": "aot_eager"})
    moe_compile.optimize(model, config=config, example_inputs=(ids,))
    check_close(gradients(model, ids), gradients(original, ids))


HOOKED = [
    "model.norm",
    "model.layers.1.input_layernorm",
    "model.layers.1.self_attn.q_norm",
    "model.layers.1.mlp.experts",
    "model.layers.1.mlp.experts.act_fn",
]


@pytest.mark.parametrize("hooked", HOOKED)
def test_a_hook_added_afterwards_fires(hooked: str) -> None:
    models = eager().copies()
    for model in (models.optimized, models.original):
        model.get_submodule(hooked).register_forward_hook(lambda _m, _a, output: output * 1.5)
    expected = step(models.original, **inputs())
    assert error(expected["logits"], eager().original(token_ids()).logits) > 1e-3
    check_close(step(models.optimized, **inputs()), expected)


def test_a_model_without_experts() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    models = make_pair(LlamaForCausalLM(config).train())
    check_close(step(models.optimized, **inputs()), step(models.original, **inputs()))
    report = moe_compile.report(models.optimized)
    assert "No mixture-of-experts block was found" in str(report)
    rewritten = {site.kind for site in report.sites if site.status == "rewritten"}
    assert rewritten >= {"rms_norm", "attention"}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a user could see changed: state, forwards, modes, flags, hooks and config."""
    return {
        name: (
            "forward" in vars(module),
            module.training,
            getattr(module, "gradient_checkpointing", None),
            [
                len(getattr(module, f"_{kind}_hooks"))
                for kind in ("forward", "forward_pre", "backward")
            ],
            sorted(vars(module)),
            str(getattr(module, "config", None)),
            getattr(getattr(module, "config", None), "_experts_implementation", None),
        )
        for name, module in model.named_modules()
    }


def test_explain_changes_nothing_and_foretells_the_report() -> None:
    model = build("mixtral", torch.bfloat16)
    model.gradient_checkpointing_enable()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    model.model.layers[0].eval()
    before, state = snapshot(model), {n: t.clone() for n, t in model.state_dict().items()}
    storage = [p.data_ptr() for p in model.parameters()]
    foretold = moe_compile.explain(model)
    assert snapshot(model) == before
    assert [p.data_ptr() for p in model.parameters()] == storage
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert moe_compile.report(moe_compile.optimize(model)).sites == foretold.sites
    after = snapshot(model)
    assert {n: v[1:4] + v[5:] for n, v in after.items()} == {
        n: v[1:4] + v[5:] for n, v in before.items()
    }
