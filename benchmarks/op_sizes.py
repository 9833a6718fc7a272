"""The shapes of benchmarks/ops.py, and random tensors of them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig


@dataclass(frozen=True)
class Sizes:
    """Qwen3-30B-A3B's."""

    tokens: int = 16384
    length: int = 4096
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    intermediate: int = 6144
    experts: int = 128
    picks: int = 8
    width: int = 768
    vocabulary: int = 151936
    device: str = "cuda"

    def draw(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        """Normal numbers."""
        x = torch.randn(shape, device=self.device) * scale
        return x.to(torch.bfloat16).requires_grad_(grad)

    def heads_of(self, number: int) -> Tensor:
        """[B, heads, S, D], laid out as a projection gives it."""
        rows = self.tokens // self.length
        flat = self.draw(rows, self.length, number, self.head_dim, grad=False)
        return flat.transpose(1, 2).requires_grad_()

    def angles(self) -> tuple[Tensor, Tensor]:
        """The cosines and sines of every position, [1, S, D]."""
        half = torch.arange(self.head_dim // 2, device=self.device) * 2 / self.head_dim
        angle = torch.arange(self.length, device=self.device)[:, None] * 1e6**-half
        both = torch.cat((angle, angle), dim=-1)[None]
        return both.cos().to(torch.bfloat16), both.sin().to(torch.bfloat16)

    def config(self) -> Qwen3MoeConfig:
        """For transformers' modules."""
        config = Qwen3MoeConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            moe_intermediate_size=self.width,
            num_experts=self.experts,
            num_experts_per_tok=self.picks,
        )
        config._experts_implementation = "grouped_mm"
        return config


TINY = Sizes(32, 16, 64, 4, 2, 16, 48, 8, 2, 32, 128, "cpu")
