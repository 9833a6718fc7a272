import copy
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moe_compile
from moe_compile import PIPELINE, OptimizeConfig
from moe_compile.kernels.deep_ep import destroy_buffers
from moe_compile.ops import combine, dispatch, rms_norm
from moe_compile.parallel.layout import ExpertParallel
from moe_compile.providers import Call
from moe_compile.providers.deepep import DeepEPProvider
from moe_compile.providers.registry import choose_dispatcher
from tests import deep_ep_elastic_emulator, deep_ep_emulator
from tests.families import build
from tests.pairs import inputs, step
from tests.ranks import on_ranks

BF16 = torch.bfloat16
REAL = SimpleNamespace(Buffer=object)  # no word of another device than CUDA
ELASTIC = SimpleNamespace(ElasticBuffer=object, find_cuda_home=lambda: "/nowhere")


def call_of(
    hidden: int = 32,
    picks: int = 2,
    experts: int = 8,
    ranks: int = 2,
    dtype: torch.dtype = BF16,
    weights: torch.dtype = torch.float32,
    device: str = "cpu",
    one_machine: bool = True,
) -> Call:
    """Fake arguments of a dispatch."""
    with FakeTensorMode():
        x = torch.empty(3, hidden, dtype=dtype, device=device)
        ids = torch.empty(3, picks, dtype=torch.int64, device=device)
        arguments = (x, ids, ids.to(weights), experts, "group")
    ep = ExpertParallel("group", ranks, ranks, one_machine) if ranks > 1 else None
    return Call(arguments, ep=ep)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", deep_ep_emulator)


@pytest.fixture
def emulated_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", deep_ep_elastic_emulator)


def reason_of(call: Call) -> str:
    refusal = DeepEPProvider().supports(dispatch, call)
    assert refusal is not None
    return refusal.reason


@pytest.mark.usefixtures("emulated")
def test_what_it_takes() -> None:
    provider = DeepEPProvider()
    limits = call_of(hidden=8176, picks=32, experts=1024, ranks=8, weights=BF16)
    for call in (call_of(), limits, call_of(hidden=16, ranks=4)):
        assert provider.supports(dispatch, call) is None
        assert provider.supports(combine, call) is None
    refusal = provider.supports(rms_norm, call_of())
    assert refusal is not None
    assert refusal.reason == "deepep does not compute rms_norm"


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "cuda:0"}, "takes tensors on cpu: got cuda"),
        ({"dtype": torch.float32}, "takes bfloat16: got torch.float32"),
        ({"weights": torch.float64}, "sends weights as float32: got torch.float64"),
        ({"hidden": 40}, "widths that 16 divides, up to 8176: got 40"),
        ({"hidden": 8192}, "widths that 16 divides, up to 8176: got 8192"),
        ({"picks": 33}, "up to 32 experts for a token: got 33"),
        ({"ranks": 1}, "takes 2, 4 or 8 ranks: got 1"),
        ({"ranks": 3, "experts": 9}, "takes 2, 4 or 8 ranks: got 3"),
        ({"ranks": 16, "experts": 64}, "takes 2, 4 or 8 ranks: got 16"),
        ({"one_machine": False}, "ranks of one machine: the EP group spans several"),
        ({"experts": 7}, "up to 128 experts a rank, equally many on each: got 7 on 2 ranks"),
        ({"experts": 258}, "up to 128 experts a rank, equally many on each: got 258 on 2 ranks"),
    ],
    ids=str,
)
def test_refuses(options: dict[str, Any], reason: str) -> None:
    assert reason in reason_of(call_of(**options))


@pytest.mark.usefixtures("emulated_v2")
def test_what_v2_takes() -> None:
    provider = DeepEPProvider()
    limits = call_of(hidden=32768, picks=32, experts=2048, ranks=8, weights=BF16)
    for call in (call_of(hidden=256), limits, call_of(hidden=512, experts=9, ranks=3)):
        assert provider.supports(dispatch, call) is None
        assert provider.supports(combine, call) is None


@pytest.mark.usefixtures("emulated_v2")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "cuda:0"}, "takes tensors on cpu: got cuda"),
        ({"dtype": torch.float32}, "takes bfloat16: got torch.float32"),
        ({"weights": torch.float64}, "sends weights as float32: got torch.float64"),
        ({"hidden": 128}, "widths that 256 divides, up to 32768: got 128"),
        ({"hidden": 33024}, "widths that 256 divides, up to 32768: got 33024"),
        ({"picks": 33}, "up to 32 experts for a token: got 33"),
        ({"ranks": 1}, "takes 2 ranks or more: got 1"),
        ({"one_machine": False}, "ranks of one machine: the EP group spans several"),
        ({"experts": 7}, "up to 256 experts a rank, equally many on each: got 7 on 2 ranks"),
        ({"experts": 514}, "up to 256 experts a rank, equally many on each: got 514 on 2 ranks"),
    ],
    ids=str,
)
def test_v2_refuses(options: dict[str, Any], reason: str) -> None:
    wide: dict[str, Any] = {"hidden": 256}
    assert reason in reason_of(call_of(**wide | options))


@pytest.mark.parametrize(
    ("classes", "name"),
    [
        (("Buffer",), "_dispatch"),
        (("ElasticBuffer",), "_elastic_dispatch"),
        (("Buffer", "ElasticBuffer"), "_dispatch"),
    ],
)
def test_v1_goes_first(
    monkeypatch: pytest.MonkeyPatch, classes: tuple[str, ...], name: str
) -> None:
    module = SimpleNamespace(**dict.fromkeys(classes, object))
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    assert DeepEPProvider().implementation(dispatch).__name__ == name


def test_refuses_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    assert "package deep_ep, whose import fails" in reason_of(call_of())
    assert "tokenspeed-deepep==1.2.1" in reason_of(call_of())
    monkeypatch.setitem(sys.modules, "deep_ep", SimpleNamespace(HybridEPBuffer=object))
    assert "deep_ep.ElasticBuffer (V2): found neither" in reason_of(call_of())
    monkeypatch.setitem(sys.modules, "deep_ep", REAL)
    assert "takes tensors on cuda: got cpu" in reason_of(call_of())


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpu(monkeypatch, "NVIDIA H100", (9, 0), True)


def set_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], joined: bool
) -> None:
    answers = {
        "get_device_name": name,
        "get_device_capability": capability,
        "device_count": 2,
        "can_device_access_peer": joined,
    }
    for function, answer in answers.items():
        monkeypatch.setattr(torch.cuda, function, lambda *_, answer=answer: answer)


@pytest.mark.usefixtures("hopper")
def test_v2_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", ELASTIC)
    monkeypatch.delenv("EP_JIT_NVCC_COMPILER", raising=False)
    call = call_of(hidden=256, device="cuda:0")
    assert "with nvcc: found none at /nowhere/bin/nvcc; set CUDA_HOME" in reason_of(call)
    monkeypatch.setenv("EP_JIT_NVCC_COMPILER", sys.executable)
    assert DeepEPProvider().supports(dispatch, call) is None


@pytest.mark.parametrize(
    ("name", "capability", "joined", "reason"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), True, "capability 9.0 or newer: got NVIDIA A100"),
        ("NVIDIA H100 PCIe", (9, 0), True, "NVLink joins: got NVIDIA H100 PCIe"),
        ("NVIDIA H100", (9, 0), False, "NVLink joins: got NVIDIA H100, not all joined"),
        ("NVIDIA H100", (9, 0), True, None),
    ],
)
def test_refuses_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    joined: bool,
    reason: str | None,
) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", REAL)
    set_gpu(monkeypatch, name, capability, joined)
    call = call_of(device="cuda:0")
    if reason is None:
        assert DeepEPProvider().supports(dispatch, call) is None
    else:
        assert reason in reason_of(call)


@pytest.mark.usefixtures("emulated")
def test_refuses_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "fill_uninitialized_memory = False" in reason_of(call_of())
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    assert DeepEPProvider().supports(dispatch, call_of()) is None
    monkeypatch.setitem(sys.modules, "deep_ep", deep_ep_elastic_emulator)
    assert "may sum a token's in any order" in reason_of(call_of())


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("wanted", "hidden", "name", "reason"),
    [
        (None, 32, "deepep", None),
        ("deepep", 32, "deepep", None),
        ("all_to_all", 32, "all_to_all", None),
        (None, 40, "all_to_all", "deepep takes widths"),
        ("deepep", 40, "all_to_all", "deepep takes widths"),
        ("torch", 32, "all_to_all", "torch has no implementation of dispatch"),
    ],
)
def test_who_dispatches(wanted: str | None, hidden: int, name: str, reason: str | None) -> None:
    provider, why = choose_dispatcher(dispatch, call_of(hidden=hidden), wanted)
    assert provider.name == name
    assert why == reason or (reason is not None and why is not None and why.startswith(reason))


def optimized(model: Any, **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    passes = PIPELINE.without("raise_norms", "raise_rotary", "raise_attention", "raise_mlps")
    config = OptimizeConfig(**options)
    return moe_compile.optimize(copy.deepcopy(model), mesh, config, passes=passes)


def check_model(emulator: str) -> None:
    rank = dist.get_rank()
    model = build("qwen3_moe", BF16, num_hidden_layers=2, hidden_size=256)
    call = inputs(batch=1 + rank, length=7 + rank, seed=rank)
    refused = optimized(model, dispatcher="deepep")
    check_report(refused, "all_to_all", "deep_ep, whose import fails: ")
    want = step(refused, **call)
    importlib.import_module(emulator).install()
    check_report(optimized(model, dispatcher="all_to_all"), "all_to_all", None)
    compile, bound = {"backend": "aot_eager"}, {"max_tokens_per_rank": 16}
    for options in (
        {},
        {"dispatcher": "deepep"},
        {"dispatcher": "deepep", "compile": compile},
        bound,
        {"compile": compile} | bound,
    ):
        mine = optimized(model, **options)
        check_report(mine, "deepep", None)
        check_step(mine, want, call)
        mine.gradient_checkpointing_enable()
        check_step(mine, want, call)
    check_bound(mine)
    destroy_buffers()


def check_bound(model: Any) -> None:
    """Of more tokens than were promised, no rank sends any."""
    rows = torch.zeros(1, 17, model.config.hidden_size, dtype=BF16)
    for call in (inputs(batch=1, length=17), {"inputs_embeds": rows, "use_cache": False}):
        with pytest.raises(ValueError, match=r"got 17 tokens .*max_tokens_per_rank"):
            model(**call)


def check_report(model: Any, name: str, reason: str | None) -> None:
    report = moe_compile.report(model)
    (site,) = [s for s in report.sites if s.kind == "experts"]
    assert (site.status, site.provider) == ("rewritten", f"{name}, torch")
    document = report.to_json()["mesh"]
    assert document["ep"] == 2
    ((found, why),) = document["dispatchers"].items()
    assert found == name
    assert (why is None) == (reason is None)
    assert (reason or "") in (why or "")
    (line,) = [line for line in str(report).splitlines() if line.startswith("Tokens travel")]
    assert line.startswith(f"Tokens travel by {name}" + ("." if reason is None else ", as deepep "))


def check_step(model: Any, want: dict[str, Any], call: dict[str, Any]) -> None:
    got = step(model, **call)
    assert got.keys() == want.keys()
    assert [n for n, v in got.items() if not torch.equal(whole(v), whole(want[n]))] == []


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.mark.matrix
@pytest.mark.parametrize("emulator", [deep_ep_emulator, deep_ep_elastic_emulator])
def test_a_model_gets_the_loss_and_gradients_of_all_to_all(emulator: ModuleType) -> None:
    on_ranks(2, check_model, emulator.__name__)
