"""How often operators run: also those of compiled graphs, if their backend runs them in Python."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    """Counts every operator that reaches a device inside, by its name without the overload."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))
