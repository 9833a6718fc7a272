"""`save_pretrained` from several ranks: the files that one process writes for the whole model."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import moe_compile
from moe_compile.checkpoint import load, save
from tests.checkpoint.folders import (
    QUICK,
    check_load_adapters,
    check_same,
    check_stored,
    everything,
    stored,
)
from tests.families import FAMILIES, build
from tests.parallel.models import optimized
from tests.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")


def save_families(folder: Path, families: list[str]) -> None:
    for family in families:
        model = optimized(build(family), "ep", QUICK)
        model.save_pretrained(folder / family)


@pytest.mark.parametrize(
    "families",
    [
        ["qwen3_moe", "gpt_oss"],
        pytest.param(sorted(FAMILIES.keys() - {"qwen3_moe", "gpt_oss"}), marks=pytest.mark.matrix),
    ],
    ids=["quick", "rest"],
)
def test_every_family_is_saved_as_one_process_saves_it(tmp_path: Path, families: list[str]) -> None:
    on_ranks(2, save_families, tmp_path, families)
    for family in families:
        build(family).save_pretrained(tmp_path / "plain" / family)
        check_stored(tmp_path / family, tmp_path / "plain" / family)


def save_on(mesh: str, folder: Path) -> list[tuple[str, int]]:
    """The files that this rank writes, and their bytes, where no file is too small for a rank."""
    written: list[tuple[str, int]] = []

    def record(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        written.append((path.name, sum(tensor.nbytes for tensor in tensors.values())))
        save_file(tensors, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "_SMALL_FILE", 1)
        patch.setattr(save, "save_file", record)
        optimized(build("mixtral"), mesh, QUICK).save_pretrained(folder)
    return written


def save_on_each(meshes: list[str], folder: Path) -> dict[str, list[tuple[str, int]]]:
    return {mesh: save_on(mesh, folder / mesh) for mesh in meshes}


@pytest.mark.parametrize(
    ("meshes", "ranks"),
    [
        (["ep", "dp_shard"], 2),
        pytest.param(["dp_replicate x ep"], 4, marks=pytest.mark.matrix),
        pytest.param(["dp_replicate x dp_shard x ep"], 8, marks=pytest.mark.matrix),
    ],
)
def test_every_rank_writes_a_part(tmp_path: Path, meshes: list[str], ranks: int) -> None:
    every = on_ranks(ranks, save_on_each, meshes, tmp_path)
    plain = build("mixtral")
    plain.save_pretrained(tmp_path / "plain")
    sizes = [p.nbytes for p in plain.parameters()]
    for mesh in meshes:
        check_stored(tmp_path / mesh, tmp_path / "plain")
        written = [each[mesh] for each in every]
        names = [name for files in written for name, _ in files]
        assert len(names) == len(set(names))
        assert sum(map(bool, written)) > ranks / 2
        largest = max(size for files in written for _, size in files)
        assert largest <= sum(sizes) / ranks + max(sizes)


LARGE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 24}


def memory_of_a_save(folder: Path) -> tuple[int, int]:
    """The bytes by which a rank grows at most while it saves, and those of the whole model."""
    with torch.device("meta"):
        model: Any = build("mixtral", num_local_experts=8, **LARGE)
    model = optimized(model, "ep", QUICK)
    load._materialize(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().fill_(0.5)  # memory counts once it is written to
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = peak()
    model.save_pretrained(folder, max_shard_size="8MB")
    return peak() - before, sum(p.nbytes for p in model.parameters())


def peak() -> int:
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a process's peak memory")
def test_no_rank_gathers_the_model(tmp_path: Path) -> None:
    for growth, whole in on_ranks(2, memory_of_a_save, tmp_path):
        assert whole > 300 * 2**20
        assert growth < whole / 2, (growth, whole)


TIED: dict[str, Any] = {"dtype": torch.bfloat16, "tie_word_embeddings": True}


def save_in_parts(folder: Path) -> None:
    model = optimized(build("mixtral", **TIED), "dp_shard x ep", QUICK)
    model.save_pretrained(folder / "one", variant=None)
    model.save_pretrained(folder / "parts", max_shard_size="20KB")
    # What an earlier save left behind is gone.
    model.save_pretrained(folder / "both", max_shard_size="20KB")
    model.save_pretrained(folder / "both")
    model.save_pretrained(folder / "both", max_shard_size="40KB")
    model.save_pretrained(folder / "variant", variant="half", max_shard_size="20KB")
    model.save_pretrained(folder / "fused", save_original_format=False)


@pytest.mark.matrix
def test_files_in_parts_tied_and_in_half_precision(tmp_path: Path) -> None:
    on_ranks(4, save_in_parts, tmp_path)
    plain = build("mixtral", **TIED)
    plain.save_pretrained(tmp_path / "plain")
    plain.save_pretrained(tmp_path / "plain_fused", save_original_format=False)
    for name in ("one", "parts", "both"):
        check_stored(tmp_path / name, tmp_path / "plain")
    check_stored(tmp_path / "fused", tmp_path / "plain_fused")
    assert "lm_head.weight" not in stored(tmp_path / "one")
    parts = sorted(p.name for p in (tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 4
    assert max(p.stat().st_size for p in (tmp_path / "parts").glob("*.safetensors")) < 22_000
    assert not (tmp_path / "both" / parts[-1]).exists()
    for name, variant in (("parts", None), ("variant", "half")):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, variant=variant)
        assert loaded.dtype == torch.bfloat16
        check_same(everything(loaded), everything(plain))


def lora(model: Any) -> Any:
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape))
    return wrapped


def save_adapters(folder: Path) -> None:
    model = optimized(lora(build("mixtral")), "ep", QUICK)
    model.save_pretrained(folder / "adapters")
    check_load_adapters(model, folder / "adapters")
    inner = model.get_base_model()
    inner.save_pretrained(folder / "inner")
    state = inner.state_dict()
    assert any(isinstance(tensor, DTensor) for tensor in state.values())
    name = next(iter(state))
    inner.save_pretrained(folder / "sharded_state", state_dict={name: state[name]})
    if dist.get_rank() == 0:  # as a trainer does that has gathered the tensors already
        inner.save_pretrained(folder / "state", state_dict={"x": torch.ones(3)})
    with pytest.raises(ValueError, match="upload_folder"):
        inner.save_pretrained(folder / "hub", push_to_hub=True)
    file = folder / f"file{dist.get_rank()}"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        inner.save_pretrained(file)
    block = folder / "blocked" / "model.safetensors"
    block.mkdir(parents=True, exist_ok=True)
    with pytest.raises(Exception, match="directory"):  # rank 0 writes it, and all stop
        inner.save_pretrained(block.parent)


def test_adapters_given_tensors_and_errors(tmp_path: Path) -> None:
    on_ranks(2, save_adapters, tmp_path)
    plain = lora(build("mixtral"))
    plain.save_pretrained(tmp_path / "plain")
    weights = "adapter_model.safetensors"
    check_same(load_file(tmp_path / "adapters" / weights), load_file(tmp_path / "plain" / weights))
    inner = plain.get_base_model()
    inner.save_pretrained(tmp_path / "plain_inner")
    check_stored(tmp_path / "inner", tmp_path / "plain_inner")
    name, tensor = next(iter(inner.state_dict().items()))
    check_same(stored(tmp_path / "sharded_state"), {name: tensor})
    check_same(stored(tmp_path / "state"), {"x": torch.ones(3)})


def test_one_process_keeps_the_class_s_own() -> None:
    model = build("mixtral", num_hidden_layers=1)
    assert "save_pretrained" not in vars(moe_compile.optimize(model, config=QUICK))
