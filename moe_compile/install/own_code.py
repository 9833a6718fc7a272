"""Functions that Dynamo compiles apart: it keeps what it compiled by code object."""

import types


def with_own_code(function: types.FunctionType, name: str) -> types.FunctionType:
    """The same function with a code object of its own, for which Dynamo keeps what it compiled."""
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
