"""`load_pretrained` gives what `from_pretrained` gives, on any mesh, from the meta device too."""

import contextlib
import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

import moe_compile
from moe_compile import load_pretrained
from tests.checkpoint.folders import QUICK, check_same, check_stored, everything, on_meta, stored
from tests.families import FAMILIES, build
from tests.pairs import check_close, inputs, step
from tests.parallel.models import check_step, optimized
from tests.ranks import on_ranks


def check_load(path: Path, mesh: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model on a mesh, loaded from meta, and the reference, as they compare equal."""
    reference: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).train()
    model = optimized(on_meta(reference.config, dtype), mesh, QUICK)
    assert all(parameter.is_meta for parameter in model.parameters())
    load_pretrained(model, path)
    check_same(everything(model), everything(reference))
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    return model, reference


def load_families(folder: Path, families: list[str]) -> None:
    for family in families:
        model, reference = check_load(folder / family, "ep")
        model.save_pretrained(folder / f"{family}_again")
        check_step(model, reference)


@pytest.mark.parametrize(
    "families",
    [
        ["qwen3_moe", "gpt_oss"],
        pytest.param(sorted(FAMILIES.keys() - {"qwen3_moe", "gpt_oss"}), marks=pytest.mark.matrix),
    ],
    ids=["quick", "rest"],
)
def test_every_family_is_loaded_trained_and_saved(tmp_path: Path, families: list[str]) -> None:
    for family in families:
        build(family).save_pretrained(tmp_path / family, max_shard_size="60KB")
    on_ranks(2, load_families, tmp_path, families)
    for family in families:
        check_stored(tmp_path / f"{family}_again", tmp_path / family)


def load_tied_and_fused(folder: Path) -> None:
    model, _ = check_load(folder / "tied", "dp_shard x ep", torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    optimizer = torch.optim.AdamW(model.parameters())
    before = everything(model)["model.layers.1.mlp.experts.down_proj"].clone()
    step(model, **inputs())
    optimizer.step()
    assert not torch.equal(everything(model)["model.layers.1.mlp.experts.down_proj"], before)
    load_pretrained(model, folder / "tied")  # also where there are values already
    assert torch.equal(everything(model)["model.layers.1.mlp.experts.down_proj"], before)
    check_load(folder / "fused", "dp_replicate x ep")
    # A correction of the router stays in float32, also in a model of bfloat16.
    corrected, _ = check_load(folder / "corrected", "dp_shard x ep", torch.bfloat16)
    bias = corrected.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32


@pytest.mark.matrix
def test_tied_fused_and_half_precision_on_four_ranks(tmp_path: Path) -> None:
    build("qwen3_moe", torch.bfloat16, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    build("mixtral").save_pretrained(tmp_path / "fused", save_original_format=False)
    build("deepseek_v3").save_pretrained(tmp_path / "corrected")
    on_ranks(4, load_tied_and_fused, tmp_path)


# They move data across the dimensions along which ranks share the parameters.
TRAPS: list[WeightConverter | WeightRenaming] = [
    WeightRenaming(".sparse.", ".mlp."),
    WeightConverter(
        [".experts.*.w1.weight", ".experts.*.w3.weight"],
        ".experts.gate_up_proj",
        [MergeModulelist(dim=0), Concatenate(dim=1), Interleave(dim=1)],
    ),
    WeightConverter(".experts.twisted", ".experts.down_proj", [Interleave(dim=0), Transpose(1, 2)]),
    WeightConverter(
        ".self_attn.kv.weight",
        [".self_attn.k_proj.weight", ".self_attn.v_proj.weight"],
        [Chunk(dim=0)],
    ),
    WeightConverter(".self_attn.q.weight", ".self_attn.q_proj.weight", [Transpose(0, 1)]),
    WeightConverter(["model.low", "model.high"], "model.embed_tokens.weight", [Concatenate(dim=0)]),
]


def set_traps() -> None:
    register_checkpoint_conversion_mapping("MixtralForCausalLM", TRAPS, overwrite=True)
    register_checkpoint_conversion_mapping("mixtral", [], overwrite=True)


def load_trapped(folder: Path, mesh: str, experts: int) -> None:
    set_traps()
    model, reference = check_load(folder, mesh)
    check_step(model, reference)
    built = optimized(build("mixtral", num_local_experts=experts), mesh, QUICK)
    built.save_pretrained(folder.parent / "saved")


def save_trapped(folder: Path, experts: int) -> None:
    set_traps()
    build("mixtral", num_local_experts=experts).save_pretrained(folder)


@pytest.mark.parametrize(
    ("mesh", "ranks", "experts"),
    [
        ("ep", 2, 4),
        # The experts' rows are shared out, not only the experts.
        pytest.param("dp_shard x ep", 4, 2, marks=pytest.mark.matrix),
    ],
)
def test_conversions_along_the_sharded_dimension(
    tmp_path: Path, mesh: str, ranks: int, experts: int
) -> None:
    plain = tmp_path / "plain"
    on_ranks(1, save_trapped, plain, experts)
    keys = stored(plain).keys()
    for kind in (
        "0.self_attn.kv.weight",
        "0.sparse.experts.twisted",
        "self_attn.q.weight",
        "model.low",
    ):
        assert any(kind in key for key in keys)
    on_ranks(ranks, load_trapped, plain, mesh, experts)
    check_stored(tmp_path / "saved", plain)


def test_on_one_device_from_meta(tmp_path: Path) -> None:
    build("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    model: Any = moe_compile.optimize(on_meta(reference.config), config=QUICK)
    load_pretrained(model, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_same(everything(model), everything(reference))
    check_close(step(model, **inputs()), step(reference, **inputs()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build("mixtral")
    model.generation_config = GenerationConfig(max_length=33, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def test_into_real_weights(checkpoint: Path) -> None:
    model = build("mixtral", seed=1)
    parameters = list(model.parameters())
    frozen = parameters[0].requires_grad_(False)
    load_pretrained(model, str(checkpoint))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not frozen.requires_grad
    assert model.generation_config is not None
    assert model.generation_config.max_length == 33
    check_same(everything(model), everything(AutoModelForCausalLM.from_pretrained(checkpoint)))


@contextlib.contextmanager
def changed(checkpoint: Path, folder: Path) -> Generator[dict[str, torch.Tensor]]:
    """The tensors of a copy of the checkpoint, to be changed."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    yield tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_wrong_keys_and_shapes_are_listed_and_nothing_is_loaded(
    checkpoint: Path, tmp_path: Path
) -> None:
    with changed(checkpoint, tmp_path) as tensors:
        del tensors["model.norm.weight"]
        tensors["model.surplus.weight"] = torch.ones(2)
        tensors["lm_head.weight"] = torch.ones(2, 2)
    model = build("mixtral", seed=1)
    before = {name: tensor.clone() for name, tensor in everything(model).items()}
    with pytest.raises(ValueError, match="does not fit a MixtralForCausalLM") as caught:
        load_pretrained(model, tmp_path)
    assert "model.norm.weight is missing" in str(caught.value)
    assert "model.surplus.weight is in the checkpoint, and not in the model" in str(caught.value)
    assert "lm_head.weight has shape (2, 2), the model's has (128, 32)" in str(caught.value)
    check_same(everything(model), before)


def test_missing_experts_are_listed(checkpoint: Path, tmp_path: Path) -> None:
    with changed(checkpoint, tmp_path) as tensors:
        experts = [key for key in tensors if ".layers.1." in key and ".experts." in key]
        for key in experts:
            del tensors[key]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.down_proj is missing"):
        load_pretrained(build("mixtral"), tmp_path)


def test_tied_parameters_may_be_stored_twice_if_they_are_equal(
    checkpoint: Path, tmp_path: Path
) -> None:
    with changed(checkpoint, tmp_path) as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model: Any = build("mixtral", tie_word_embeddings=True)
    load_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        load_pretrained(model, checkpoint)


def test_folders_without_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    model = build("mixtral", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"is no folder; it takes .*snapshot_download"):
        load_pretrained(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no"):
        load_pretrained(model, tmp_path)
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names model-00001-of-00001\.safetensors, which"):
        load_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="got a Linear; it takes a transformers model"):
        load_pretrained(torch.nn.Linear(2, 2), checkpoint)


def stays_sharded(folder: Path) -> None:
    model, _ = check_load(folder, "dp_shard")
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_without_expert_parallelism(checkpoint: Path) -> None:
    on_ranks(2, stays_sharded, checkpoint)
