"""One training call of each kind of model."""

from typing import Any

import torch
from torch import Tensor

from tests.pairs import token_ids
from tests.zoo.entries import Entry
from tests.zoo.shrink import FIRST_SPECIAL_ID


def call_of(entry: Entry, batch: int = 2, length: int = 10, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a forward in training."""
    ids = token_ids(batch, length, seed) % (FIRST_SPECIAL_ID - 3) + 3
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def loss_of(output: Any) -> Tensor:
    """The model's own loss; for one without, the sum of squares of what it gives."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    return torch.stack([feature.square().mean() for feature in output.feature_maps]).sum()
