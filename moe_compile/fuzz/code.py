"""Lines of Python, put together."""

from collections.abc import Iterable


def indent(lines: Iterable[str], levels: int = 1) -> list[str]:
    """Lines moved to the right; empty ones stay empty."""
    return ["    " * levels + line if line else "" for line in lines]


def method(signature: str, body: Iterable[str]) -> list[str]:
    """A method of a class."""
    return [f"def {signature}:", *indent(body)]


def module_class(name: str, state: Iterable[str], *methods: list[str]) -> list[str]:
    """A subclass of `nn.Module`; `state` are the lines of its constructor."""
    lines = method("__init__(self)", ["super().__init__()", *state])
    for each in methods:
        lines += ["", *each]
    return [f"class {name}(nn.Module):", *indent(lines)]
