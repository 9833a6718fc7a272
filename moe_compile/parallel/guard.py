"""What is put into a sharded model later is not sharded: an error, not a wrong gradient."""

from typing import Any

from torch import nn


def forbid_additions(model: nn.Module) -> None:
    """Makes the model's forward fail once modules have been added, as LoRA is.

    Their parameters would be equal on no two ranks after a step: nobody averages their gradients.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    count = _count(model)

    def check(module: nn.Module, _: Any) -> None:
        if _count(module) == count:
            return
        new = [n for n, _ in module.named_parameters() if n not in known]
        example = f", such as {new[0]}," if new else ""
        raise RuntimeError(
            f"the model has modules{example} that were added after optimize: they are not spread "
            "over the ranks, and nobody would average their gradients; add them before optimize"
        )

    model.register_forward_pre_hook(check, prepend=True)


def _count(model: nn.Module) -> int:
    return sum(1 for _ in model.modules())
