"""Families whose checkpoints hold their experts in another form than the model does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_compile import load_pretrained
from tests.checkpoint.folders import QUICK, check_same, check_stored, everything
from tests.parallel.models import optimized
from tests.ranks import on_ranks
from tests.zoo.entries import build, entry_of

FAMILIES = ["ernie4_5_vl_moe", "kimi_linear", "minimax_m3_vl", "qwen3_next"]


def load_and_save(folder: Path, kind: Any) -> None:
    """On two ranks, from the meta device, what one process loads; and back."""
    reference = kind.from_pretrained(folder / "plain").train()
    with torch.device("meta"):
        model = kind._from_config(reference.config, dtype=reference.dtype).train()
    model = optimized(model, "ep", QUICK)
    load_pretrained(model, folder / "plain")
    check_same(everything(model), everything(reference))
    model.save_pretrained(folder / "again")


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_and_saved_bit_for_bit(tmp_path: Path, family: str) -> None:
    model: Any = build(entry_of(family))
    model.save_pretrained(tmp_path / "plain")
    on_ranks(2, load_and_save, tmp_path, type(model))
    check_stored(tmp_path / "again", tmp_path / "plain")
