"""One MoE block (router, experts, combine) on one GPU, forward and backward, in bfloat16.

python benchmarks/experts.py
python benchmarks/experts.py --shapes 8192,2048,768,128,8 --profile

`hf` is transformers' block with `grouped_mm`, `hf_compiled` the same in one compiled graph, and
`moe_compile` is that block after `optimize`, compiled, with the products of the provider torch;
`moe_triton` with those of triton, and `moe_quack` with those of quack, where it is installed. Same
weights and tokens; errors are relative L2 against `hf`, the worst of the output and every gradient.
TFLOP/s count the experts' products only: 6 T K H I forward and three times that with the backward.
"""

import argparse
import copy
import importlib.util

import torch
from machine import describe, markdown
from timing import milliseconds, show_kernels, worst
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_compile

SHAPES = ("8192,2048,768,128,8", "32768,2048,768,128,8", "16384,2048,1024,64,8")


class Block(nn.Module):
    """A model of one MoE block."""

    def __init__(self, hidden: int, intermediate: int, experts: int, picks: int) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=hidden,
            moe_intermediate_size=intermediate,
            num_experts=experts,
            num_experts_per_tok=picks,
            norm_topk_prob=True,
        )
        config._experts_implementation = "grouped_mm"
        self.mlp = Qwen3MoeSparseMoeBlock(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, H]."""
        out = self.mlp(x)
        return out[0] if isinstance(out, tuple) else out


def step(block: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    out = block(x)
    return [out, *torch.autograd.grad(out, [x, *block.parameters()], grad)]


def optimized(block: nn.Module, x: Tensor, provider: str) -> nn.Module:
    """A copy of the block whose experts are a provider's, compiled."""
    config = moe_compile.OptimizeConfig(providers={"experts": provider})
    ours = moe_compile.optimize(copy.deepcopy(block), config=config, example_inputs=(x,))
    return torch.compile(ours, fullgraph=True, dynamic=False)  # pyright: ignore[reportReturnType]


def measure(shape: str, profiled: bool) -> list[tuple[str, ...]]:
    """A row for each way."""
    tokens, hidden, width, experts, picks = map(int, shape.split(","))
    torch.manual_seed(0)
    with torch.device("cuda"):
        hf = Block(hidden, width, experts, picks).to(torch.bfloat16)
    x = torch.randn(1, tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    blocks = {
        "hf": hf,
        "hf_compiled": torch.compile(copy.deepcopy(hf), fullgraph=True, dynamic=False),
        "moe_compile": optimized(hf, x.detach(), "torch"),
        "moe_triton": optimized(hf, x.detach(), "triton"),
    }
    if importlib.util.find_spec("quack") is not None:
        blocks["moe_quack"] = optimized(hf, x.detach(), "quack")
    wanted, rows = step(hf, x, grad), list[tuple[str, ...]]()
    flops = 6 * tokens * picks * hidden * width
    for name, block in blocks.items():
        torch._dynamo.reset()
        error = worst(step(block, x, grad), wanted)
        with torch.no_grad():
            forward = milliseconds(lambda block=block: block(x))
        both = milliseconds(lambda block=block: step(block, x, grad))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = block(x)
        kept = torch.cuda.memory_allocated() - before
        del out
        cells = f"{forward:.2f} ms", f"{flops / forward / 1e9:.0f}", f"{both:.2f} ms"
        rate, saved = f"{3 * flops / both / 1e9:.0f}", f"{kept / tokens / 1024:.1f} KiB"
        rows.append((shape, name, *cells, rate, saved, f"{error:.1e}"))
        if profiled:
            show_kernels(name, lambda block=block: step(block, x, grad))
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="T,H,I,E,K")
    parser.add_argument("--profile", action="store_true", help="print kernels and their times")
    args = parser.parse_args()
    rows = [row for shape in args.shapes for row in measure(shape, args.profile)]
    print(describe())
    header = ("T,H,I,E,K", "block", "forward", "TFLOP/s", "forward, backward", "TFLOP/s")
    print(markdown((*header, "kept a token", "worst error"), rows))


if __name__ == "__main__":
    main()
