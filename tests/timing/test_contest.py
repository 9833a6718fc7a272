import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import init_device_mesh

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.ops import experts, rms_norm
from moe_compile.parallel.agree import on_every_rank
from moe_compile.parallel.layout import layout_of
from moe_compile.providers import Call, registry
from moe_compile.rewrite.normal_form import aten
from moe_compile.rewrite.region import Region
from moe_compile.timing import Contests, Timing, contest, measure, versions
from moe_compile.timing.cache import TimingCache
from moe_compile.timing.inputs import Sizes
from moe_compile.timing.race import Race
from tests.families import build
from tests.pairs import inputs, step
from tests.ranks import on_ranks
from tests.timing.providers import FAST, SLOW, Broken, Sleeper, Wordy

CPU = torch.device("cpu")
CALL = Call((torch.ones(2, 8), torch.ones(8), 1e-6))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_COMPILE_CACHE", str(tmp_path))
    return tmp_path / "timings.json"


def contests(**options: Any) -> Contests:
    return Contests(CPU, Sizes({}, 1), **options)


def pair() -> tuple[Sleeper, Sleeper]:
    return Sleeper("slow", SLOW), Sleeper("fast", FAST)


def test_the_fastest_wins_whatever_the_order() -> None:
    slow, fast = pair()
    for takers in ([slow, fast], [fast, slow]):
        timing = contests().decide(rms_norm, CALL, takers)
        assert timing.first(takers) is fast
        assert timing.milliseconds["slow"] > 1e3 * SLOW > timing.milliseconds["fast"] > 0
        assert timing.call.startswith("x float32[2, 8], weight float32[8], eps 1e-06")


def test_what_was_timed_is_not_timed_again(cache: Path) -> None:
    takers = [*pair()]
    first = contests().decide(rms_norm, CALL, takers)
    for provider in takers:
        provider.calls.clear()
    assert contests().decide(rms_norm, CALL, takers) == first
    assert not any(provider.calls for provider in takers)
    assert len(json.loads(cache.read_text())) == 1


def test_one_run_reads_its_cache_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decide, takers = contests().decide, [*pair()]
    first = decide(rms_norm, CALL, takers)
    monkeypatch.setattr(TimingCache, "read", None)
    assert decide(rms_norm, CALL, takers) is first


@pytest.mark.parametrize(
    "change",
    ["torch", "package", "device", "takers", "shape", "dtype", "eps", "compiled", "autocast"],
)
def test_a_timing_holds_for_nothing_else(
    change: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    takers, call, options = [*pair()], CALL, None
    contests().decide(rms_norm, call, takers)
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "3.0")
    elif change == "package":
        takers = [Sleeper("slow", SLOW, "pytest"), takers[1]]
    elif change == "device":
        monkeypatch.setattr(versions.platform, "processor", lambda: "another")
    elif change == "takers":
        takers.append(Sleeper("other", FAST))
    elif change == "shape":
        call = Call((torch.ones(3, 8), *CALL.args[1:]))
    elif change == "dtype":
        call = Call((CALL.args[0].double(), *CALL.args[1:]))
    elif change == "eps":
        call = Call((*CALL.args[:2], 1e-5))
    elif change == "autocast":
        call = Call(CALL.args, autocast=torch.bfloat16)  # of float32
    else:
        options = {"backend": "eager"}
    contests(options=options).decide(rms_norm, call, takers)
    assert len(json.loads(cache.read_text())) == 2


def test_layers_that_are_compiled_time_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed sizes, one graph; and any number of calls, of which each has its own code."""
    seen: list[dict[str, Any]] = []

    def compile(function: Any, **options: Any) -> Any:
        seen.append(options)
        return function

    takers = registry.takers(rms_norm, CALL)[0]
    decide = contests(options={"fullgraph": True, "backend": "aot_eager"}).decide
    for width in range(9, 18):  # Dynamo compiles eight versions of one code
        timing = decide(rms_norm, Call((torch.ones(2, width), torch.ones(width), 1e-6)), takers)
        assert set(timing.milliseconds) == {"torch", "formula"}, timing
    monkeypatch.setattr(torch, "compile", compile)
    decide(rms_norm, CALL, takers)
    assert seen == [{"fullgraph": True, "backend": "aot_eager", "dynamic": False}] * 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_experts_with_an_activation_from_a_graph() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(aten.silu.default, (graph.placeholder("x"),)))
    x, up, down = torch.ones(6, 8), torch.ones(4, 16, 8), torch.ones(4, 8, 16)
    ids = torch.zeros(6, 2, dtype=torch.int64)
    call = Call((x, ids, torch.ones(6, 2), up, down, Region(graph)))
    taking, _ = registry.takers(experts, call)
    options = {"fullgraph": True, "backend": "aot_eager"}
    timing = contests(options=options).decide(experts, call, taking)
    assert timing.failures == {}
    assert set(timing.milliseconds) == {"torch", "formula"}


def test_who_fails_does_not_win() -> None:
    takers = [Broken("broken", FAST), Sleeper("slow", SLOW)]
    timing = contests().decide(rms_norm, CALL, takers)
    assert timing.first(takers) is takers[1]
    assert timing.failures == {"broken": "it fails: RuntimeError: no kernel image for this device"}


def test_where_all_fail_preference_decides() -> None:
    takers = [Broken("broken", FAST), Broken("too", FAST)]
    timing = contests().decide(rms_norm, CALL, takers)
    assert (timing.first(takers), timing.reason) == (takers[0], "each of them fails")


def test_what_does_not_fit_into_memory_is_not_timed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 100)
    takers = [*pair()]
    timing = contests().decide(rms_norm, CALL, takers)
    assert timing.first(takers) is takers[0]
    assert timing.reason == "timing needs about 0.0 GiB: 0.0 GiB are free"
    assert not cache.exists()


def test_running_out_of_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*args: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measure, "prepare", prepare)
    timing = contests().decide(rms_norm, CALL, [*pair()])
    assert timing.reason == "the device ran out of memory while candidates were timed"


def test_the_random_state_stays_as_it_was() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    contests().decide(rms_norm, CALL, [*pair()])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("measured", "device", "reason"),
    [
        ("auto", "cuda", None),
        (True, "cpu", None),
        ("auto", "cpu", "on a CPU only OptimizeConfig(measure=True) times them"),
        (False, "cuda", "OptimizeConfig(measure=False)"),
        (True, "mps", "only cuda and cpu have a clock here, not mps"),
    ],
)
def test_when_it_times(measured: Any, device: str, reason: str | None) -> None:
    assert contest._why_off(OptimizeConfig(measure=measured), torch.device(device)) == reason


def test_off_is_preference() -> None:
    takers = [*pair()]
    timing = contests(off="a reason").decide(rms_norm, CALL, takers)
    assert timing == Timing(reason="a reason")
    assert timing.first(takers) is takers[0]


@pytest.mark.parametrize(
    ("promised", "numbers"),
    [(None, (2, 128)), (64, (1, 64)), (1024, (8, 128))],
)
def test_as_many_tokens_as_are_promised(promised: int | None, numbers: tuple[int, int]) -> None:
    assert contest._numbers(promised, CPU) == numbers


def sleepers(monkeypatch: pytest.MonkeyPatch) -> tuple[Sleeper, Sleeper]:
    """Two more providers, of which the preferred one is slow."""
    slow, fast = pair()
    monkeypatch.setattr(registry, "PROVIDERS", (slow, fast, *registry.PROVIDERS[:3]))
    return slow, fast


def test_a_model_runs_what_won(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, _ = sleepers(monkeypatch)
    config = OptimizeConfig(measure=True, autocast=False, providers={"experts": "torch"})
    model = moe_compile.optimize(build("mixtral"), config=config)
    report = moe_compile.report(model)
    norms = [site for site in report.sites if site.kind == "rms_norm"]
    assert {site.provider for site in norms} <= {"fast", "torch"}
    for site in norms:
        (choice,) = site.timings
        assert choice.milliseconds["slow"] > 1e3 * SLOW
        assert choice.provider == min(choice.milliseconds, key=choice.milliseconds.__getitem__)
        assert f"{site.provider} ({choice.milliseconds[str(site.provider)]:.2f} ms; " in str(report)
    assert report.seconds["timing"] > 0
    slow.calls.clear()
    step(model, **inputs())
    assert not slow.calls
    document = report.to_json()
    assert json.loads(json.dumps(document)) == document


def test_the_wanted_one_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = sleepers(monkeypatch)
    wanted = {"rms_norm": "slow", "experts": "torch"}
    config = OptimizeConfig(measure=True, autocast=False, verify="off", providers=wanted)
    report = moe_compile.explain(build("mixtral"), config=config)
    norms = [site for site in report.sites if site.kind == "rms_norm"]
    assert [(site.provider, site.timings) for site in norms] == [("slow", ())] * len(norms)
    assert "timing" not in report.seconds
    assert not slow.calls
    assert not fast.calls


def test_the_report_says_why_nothing_was_timed() -> None:
    report = moe_compile.explain(build("mixtral"), config=OptimizeConfig(verify="off"))
    reason = "on a CPU only OptimizeConfig(measure=True) times them"
    line = f"Preferred, not timed: providers of rms_norm, experts; {reason}."
    assert line in str(report).splitlines()
    reasons = {choice.reason for site in report.sites for choice in site.timings}
    assert reasons == {reason}


def test_autocast_to_what_everything_is_changes_nothing(cache: Path) -> None:
    args = (torch.ones(2, 8).bfloat16(), torch.ones(8).bfloat16(), 1e-6)
    for autocast in (None, torch.bfloat16):
        contests().decide(rms_norm, Call(args, autocast=autocast), [*pair()])
    assert len(json.loads(cache.read_text())) == 1


def agree(folder: str) -> tuple[str, dict[str, float], list[str]]:
    """On rank 1 the other one is slow; and it has a cache of its own, which nobody reads."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    first = dist.get_rank() == 0
    takers = [Sleeper("a", SLOW if first else FAST), Sleeper("b", FAST if first else SLOW)]
    cache = TimingCache(Path(folder, f"{dist.get_rank()}.json"))
    timing = contests(layout=layout_of(mesh), cache=cache).decide(rms_norm, CALL, takers)
    files = sorted(path.name for path in Path(folder).iterdir())
    return timing.first(takers).name, dict(timing.milliseconds), files


def test_ranks_choose_what_rank_0_timed(tmp_path: Path) -> None:
    (name, numbers, _), (other, same, files) = on_ranks(2, agree, str(tmp_path))
    assert (name, other) == ("b", "b")
    assert numbers == same
    assert files == ["0.json"]


def spread(folder: str) -> list[tuple[str | None, str]]:
    """Experts of a model on two ranks: their providers, and what they were timed with."""
    os.environ["MOE_COMPILE_CACHE"] = folder
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    config = OptimizeConfig(measure=True, autocast=False, providers={"rms_norm": "torch"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "PROVIDERS", (*registry.PROVIDERS, Wordy("wordy", FAST)))
        model = moe_compile.optimize(build("mixtral"), mesh, config)
    sites = [site for site in moe_compile.report(model).sites if site.kind == "experts"]
    own_words = f"it cannot be loaded: rank {dist.get_rank()}"
    assert all(choice.left_out["wordy"] == own_words for s in sites for choice in s.timings)
    loss = model(**inputs()).loss
    loss.backward()
    return [(site.provider, choice.call) for site in sites for choice in site.timings]


def test_ranks_time_their_share_of_the_experts(tmp_path: Path) -> None:
    first, second = on_ranks(2, spread, str(tmp_path))
    assert first == second
    whole = build("mixtral").config.num_local_experts
    for provider, call in first:
        assert provider in ("all_to_all, torch", "all_to_all, formula")
        assert f"up float32[{whole // 2}, " in call


def differ() -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    name = "a" if dist.get_rank() == 0 else "b"
    with pytest.raises(ValueError, match="optimize got different plans on its ranks") as error:
        contests(layout=layout_of(mesh)).decide(rms_norm, CALL, [Sleeper(name, FAST)] * 2)
    return str(error.value)


def test_ranks_with_other_candidates_are_an_error_on_all() -> None:
    first, second = on_ranks(2, differ)
    assert "by a, a;" in first
    assert first == second


def stops(*_: object) -> None:
    raise ArithmeticError("the clock stands still")


def failing() -> str:
    """A clock that stops on rank 0, the only one that looks at it."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    own, takers = contests(layout=layout_of(mesh)), [*pair()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Race, "run", stops)
        with pytest.raises(Exception, match="stands") as error:
            on_every_rank("optimize", lambda: own.decide(rms_norm, CALL, takers), 2)
    return str(error.value)


def test_a_rank_that_cannot_time_is_an_error_on_all() -> None:
    first, second = on_ranks(2, failing)
    assert first == "the clock stands still"
    assert second.startswith("optimize failed on rank 0: ArithmeticError")


def test_a_spoilt_cache_is_named_and_made_anew(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text('{"half": ')
    takers = [*pair()]
    with caplog.at_level(logging.WARNING):
        timing = contests().decide(rms_norm, CALL, takers)
    assert timing.first(takers) is takers[1]
    assert str(cache) in caplog.text
    assert len(json.loads(cache.read_text())) == 1
