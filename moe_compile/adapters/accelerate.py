"""Everything that moe_compile knows of accelerate, which Hugging Face's Trainer runs on.

One private name: the attribute `_is_accelerate_prepared`, by which `Accelerator.prepare` knows a
model that it need not wrap. Where accelerate stops looking at it, it wraps the model in DDP, which
raises an error about DTensors.
"""

from torch import nn


def mark_prepared(model: nn.Module) -> None:
    """Tells accelerate that the model is spread over its ranks already."""
    vars(model)["_is_accelerate_prepared"] = True
