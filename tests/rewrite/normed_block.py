"""A block whose experts share the module of a norm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPERTS, HIDDEN = 4, 8


class Experts(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, 16, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 8) * 0.3)
        self.norm = norm

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, pick = torch.where(ids == e)
            gate, up = F.linear(x[token], self.up[e]).chunk(2, dim=-1)
            rows = self.norm(F.linear(F.silu(gate) * up, self.down[e]))
            out.index_add_(0, token, (rows * weights[token, pick, None]).to(out.dtype))
        return out


class Block(nn.Module):
    """`before`: the experts get projected tokens through a norm of their own. The block ends in
    a norm that is no module, so that it is captured whole under autocast, too.
    """

    def __init__(self, norm: Callable[[], nn.Module], *, before: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.project = nn.Linear(HIDDEN, HIDDEN) if before else nn.Identity()
        self.before = norm() if before else nn.Identity()
        self.experts = Experts(norm())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = self.gate(tokens).softmax(-1).topk(2)
        out = self.experts(self.before(self.project(tokens)), ids, weights).view(x.shape)
        return out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6)
