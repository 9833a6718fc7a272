"""Plain modules, whose inputs are given."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from tests.pairs import check_close

EXPERTS, HIDDEN = 4, 8
X = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))


class Listed(nn.Module):
    """The model's own code is that of the experts, which are a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        mlps = (
            nn.Sequential(nn.Linear(HIDDEN, 6), nn.GELU(), nn.Linear(6, HIDDEN)) for _ in "abcd"
        )
        self.experts = nn.ModuleList(mlps)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        weights, ids = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, pick = torch.where(ids == number)
            out = out.index_add(0, token, expert(flat[token]) * weights[token, pick, None])
        return out.view(x.shape)


class Stacked(nn.Module):
    """The same of a stack of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 6, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        weights, ids = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number in range(EXPERTS):
            token, pick = torch.where(ids == number)
            rows = F.silu(flat[token] @ self.up[number].T) @ self.down[number].T
            out = out.index_add(0, token, rows * weights[token, pick, None])
        return out.view(x.shape)


class Once(nn.Module):
    """One block between other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.block = nn.Linear(HIDDEN, HIDDEN), Stacked()
        self.after = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.block(self.before(x)))


class Tied(nn.Module):
    """Two layers with the same experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Stacked() for _ in range(2))
        self.layers[1].up, self.layers[1].down = self.layers[0].up, self.layers[0].down

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def step(model: nn.Module) -> dict[str, Tensor]:
    out = model(X)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **gradients}


@pytest.mark.parametrize(
    ("kind", "module", "layers"),
    [(Listed, "", 1), (Stacked, "", 1), (Once, "block", 1), (Tied, "layers.0", 2)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_block_is_found_in_any_module(kind: type[nn.Module], module: str, layers: int) -> None:
    torch.manual_seed(0)
    original = kind()
    model = moe_compile.optimize(copy.deepcopy(original), example_inputs=(X,))
    sites = [site for site in moe_compile.report(model).sites if site.kind == "experts"]
    assert [(s.module, s.layers, s.status) for s in sites] == [(module, layers, "rewritten")]
    check_close(step(model), step(original))
