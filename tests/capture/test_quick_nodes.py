"""What is traced the short way is the graph that torch would trace."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from moe_compile.capture import trace as tracing
from moe_compile.capture.shadow import Shadow, cast_shadow
from moe_compile.capture.trace import trace_function


def _loop(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=4).permute(2, 1, 0)
    for expert in range(4):
        pick, token = torch.where(mask[expert])
        gate, up = F.linear(x[token], weight[expert]).chunk(2, -1)
        scale = ids[token, pick, None].to(x.dtype)
        out.index_add_(0, token, F.pad(F.silu(gate) * up * scale, (0, 4)))
    return out


def _written_to(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    whole = x.clone()
    for column in range(3):
        part = whole[:, column]
        whole.add_(part.unsqueeze(-1))
        part.mul_(2)
        whole.add_(part.unsqueeze(-1) * part.unsqueeze(-1))
    return whole


def _cast(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    for expert in range(4):
        x = x + F.linear(F.linear(x, weight[expert]), weight[expert].t())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = x + F.linear(F.linear(x, weight[expert]), weight[expert].t())
    return x


def _of_many_kinds(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    for _ in range(3):
        x = F.dropout(x.double().float(), 0.5) + x.clamp(max=3).pow(2).mean(-1, keepdim=True)
        x = torch.cat([x[:, :4], x.reshape(-1, 8)[:, 4:]], -1) * x.shape[0]
        x = x + torch.tensor(2.0) + torch.rand_like(x)
    return x


@pytest.mark.parametrize("function", [_loop, _written_to, _cast, _of_many_kinds])
def test_the_graph_is_torchs(
    function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = _traced(function)
    monkeypatch.setattr(tracing, "quick_nodes", contextlib.nullcontext)

    assert quick == _traced(function)


def test_what_was_traced_before_does_not_go_through_torchs_tracer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    traced: Any = ProxyTorchDispatchMode.__torch_dispatch__

    def ask(mode: Any, func: Any, *args: Any) -> Any:
        asked.append(func)
        return traced(mode, func, *args)

    monkeypatch.setattr(ProxyTorchDispatchMode, "__torch_dispatch__", ask)

    _traced(_loop)

    aten = torch.ops.aten
    for once in (aten.linear.default, aten.silu.default, aten.index_add.default):
        assert asked.count(once) == 1


def _traced(function: Callable[..., Tensor]) -> list[str]:
    shadow = cast_shadow(nn.Linear(1, 1))
    with shadow.mode:
        graph = trace_function(function, _inputs(shadow))
    names: dict[fx.Node, str] = {node: f"n{i}" for i, node in enumerate(graph.nodes)}
    return [_line(node, names) for node in graph.nodes]


def _inputs(shadow: Shadow) -> list[Tensor]:
    tokens: Any = shadow.batch
    weight = torch.empty(4, 8, 8)
    return [torch.empty(tokens, 8), weight, torch.empty(tokens, 2, dtype=torch.int64)]


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    arguments = fx.map_arg((node.args, node.kwargs), lambda n: names[n])
    return f"{names[node]} = {node.target} {arguments} {_form(node.meta.get('val'))}"


def _form(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_form(part) for part in value]
    if not isinstance(value, Tensor):
        return str(value)
    place = tuple(value.shape), value.stride(), value.storage_offset()
    return str(place), value.dtype, value.device
