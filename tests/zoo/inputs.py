"""One training call of each kind of model."""

from typing import Any

import torch
from torch import Tensor

from tests.pairs import token_ids
from tests.zoo.entries import Entry, arguments_of, config_of
from tests.zoo.shrink import FIRST_SPECIAL_ID, HIDDEN

Call = dict[str, Any]
_IMAGES: dict[str, tuple[int, tuple[int, ...]]] = {
    "aria": (4, (3, 16, 16)),
    "inkling_mm_model": (1, (2, 2, 2, 3)),
    "llama4": (4, (3, 16, 16)),
    "step3p7": (1, (3, 16, 16)),
}
"""How many tokens an image gives, and its shape."""


def call_of(entry: Entry, batch: int = 2, length: int = 10, seed: int = 0) -> Call:
    """Keyword arguments of a forward in training.

    Of the models for images, three get text alone, as they allow: deepseek_ocr2 (its tower gives
    hundreds of tokens), gemma4 and diffusion_gemma (by default they have no tower).
    """
    call = _MAKERS.get(entry.name, _text)(batch, length, seed)
    if "image_grid_thw" in arguments_of(entry) and "input_ids" in call:
        call |= _with_patches(entry, call["input_ids"], seed)
    elif entry.name in _IMAGES:
        call |= _with_image(entry, call["input_ids"], seed)
    if "moe_mm_token_type_ids" in arguments_of(entry):
        call["moe_mm_token_type_ids"] = call["mm_token_type_ids"]
    return call


def loss_of(output: Any) -> Tensor:
    """The model's own loss; for one without, the mean square of what it gives."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    if getattr(output, "logits", None) is not None:
        return output.logits.square().mean()
    return torch.stack([feature.square().mean() for feature in output.feature_maps]).sum()


def _text(batch: int, length: int, seed: int) -> Call:
    ids = token_ids(batch, length, seed) % (FIRST_SPECIAL_ID - 3) + 3
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _embeddings(batch: int, length: int, seed: int) -> Call:
    """For a decoder that gets the hidden states of another model."""
    call = _text(batch, length, seed)
    del call["input_ids"]
    states = torch.randn(batch, length, HIDDEN, generator=_generator(seed))
    positions = torch.arange(length).expand(3, batch, length)
    return call | {"inputs_embeds": states, "position_ids": positions}


def _canvas(batch: int, length: int, seed: int) -> Call:
    """A prompt and the text to refine, random where it is not given; there is no loss."""
    return {
        "input_ids": _text(batch, length, seed)["input_ids"],
        "decoder_input_ids": _text(batch, 8, seed + 1)["input_ids"],
    }


def _images(batch: int, _: int, seed: int) -> Call:
    """An image and the index of its dataset, which chooses the expert."""
    pixels = torch.randn(batch, 3, 32, 32, generator=_generator(seed))
    return {"pixel_values": pixels, "dataset_index": torch.arange(batch) % 4}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


_MAKERS = {
    "diffusion_gemma": _canvas,
    "qwen3_omni_moe_talker": _embeddings,
    "vitpose_backbone": _images,
}


def _with_patches(entry: Entry, ids: Tensor, seed: int) -> Call:
    """One image in every row, as the towers take it that cut patches before."""
    vision = config_of(entry).vision_config
    patch = (3, vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1))
    pixels = torch.randn(16 * len(ids), *patch, generator=_generator(seed))
    as_images = entry.name == "kimi_k25"
    return _with_tokens(entry, ids, 4) | {
        "pixel_values": pixels.unflatten(2, (4, 4)) if as_images else pixels.flatten(1),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(ids)),
    }


def _with_image(entry: Entry, ids: Tensor, seed: int) -> Call:
    """One image in every row."""
    tokens, shape = _IMAGES[entry.name]
    pixels = torch.randn(len(ids), *shape, generator=_generator(seed))
    call = _with_tokens(entry, ids, tokens) | {"pixel_values": pixels}
    del call["mm_token_type_ids"]
    return call


def _with_tokens(entry: Entry, ids: Tensor, tokens: int) -> Call:
    """The ids with tokens of an image in every row."""
    config: Any = config_of(entry)
    image_id = getattr(config, "image_token_id", None) or config.image_token_index
    ids = ids.clone()
    ids[:, 1 : 1 + tokens] = image_id
    labels = ids.masked_fill(ids == image_id, -100)
    return {"input_ids": ids, "labels": labels, "mm_token_type_ids": (ids == image_id).int()}
