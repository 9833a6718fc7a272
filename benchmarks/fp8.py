"""Training in FP8 against bfloat16: curves of losses on a text, and times, on one GPU.

python benchmarks/fp8.py                          # bf16, and FP8 by the recipe "current"
python benchmarks/fp8.py bf16 bf16 blockwise      # what two runs in bfloat16 differ by, too
python benchmarks/fp8.py --tiny                   # a small model on the CPU

A Qwen3-30B-A3B of `--layers` of its 48 layers, at its real widths, with random weights that are the
same each time, trained by fused AdamW on the bytes of a text, `--steps` steps. Each way is
`moe_compile.optimize`, FP8 with the pass `QuantizeToFP8(recipe)`. Times are medians of the second
half; `apart` is the mean distance of a way's losses from the first's over its last 50 steps.
"""

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from machine import describe, markdown
from one_gpu import config_of
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_compile
from moe_compile.passes import QuantizeToFP8

RATE = 3e-4
LAST = 50


def build(way: str, args: argparse.Namespace) -> PreTrainedModel:
    """The optimized model of a way."""
    torch.manual_seed(0)
    config = tiny_config() if args.tiny else config_of(args.layers)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = Qwen3MoeForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    passes = moe_compile.PIPELINE
    if way != "bf16":
        passes = passes.before("choose_providers", QuantizeToFP8(way))  # type: ignore[arg-type]
    options: dict[str, Any] = {"passes": passes}
    return moe_compile.optimize(model, **options)


def tiny_config() -> Qwen3MoeConfig:
    """Of all recipes' sizes, and small."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    return Qwen3MoeConfig(vocab_size=256, num_experts_per_tok=2, use_cache=False, **sizes, **heads)


def batch_of(number: int, text: Tensor, args: argparse.Namespace) -> Tensor:
    """The bytes of a step: the text goes round."""
    count = args.batch * args.length
    ids = text[torch.arange(number * count, (number + 1) * count) % len(text)]
    return ids.view(args.batch, args.length).to(args.device)


def train(model: PreTrainedModel, args: argparse.Namespace) -> tuple[list[float], float, float]:
    """The losses, and the milliseconds of forward and backward and of whole steps."""
    from pydoc_data import topics

    text = torch.tensor(list("\n".join(topics.topics.values()).encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    losses, passes, steps = list[Tensor](), list[float](), list[float]()
    for number in range(args.steps):
        ids = batch_of(number, text, args)
        start = clock(args)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        passes.append(clock(args) - start)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(clock(args) - start)
        losses.append(loss.detach().float())
    medians = (statistics.median(t[args.steps // 2 :]) * 1e3 for t in (passes, steps))
    return torch.stack(losses).tolist(), *medians


def clock(args: argparse.Namespace) -> float:
    """Seconds, when the device has done its work."""
    if not args.tiny:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(way: str, args: argparse.Namespace) -> tuple[list[float], tuple[str, ...]]:
    """A way's losses, and its row."""
    begin = time.perf_counter()
    model = build(way, args)
    ready = time.perf_counter() - begin
    losses, both, step = train(model, args)
    report = moe_compile.report(model)
    chosen = {s.kind: s.providers() for s in report.sites if s.numerics or s.kind == "experts"}
    told = [line for line in str(report).splitlines() if line.startswith(("NOT EXACT", "Not q"))]
    print(way, "; ".join(f"{kind}: {who}" for kind, who in chosen.items()), *told, sep="\n  ")
    peak = 0.0 if args.tiny else torch.cuda.max_memory_allocated() / 2**30
    tokens = args.batch * args.length / both * 1e3
    times = f"{both:.1f} ms", f"{step:.1f} ms", f"{tokens:,.0f}", f"{peak:.1f} GiB"
    del model
    gc.collect()
    torch.compiler.reset()
    if not args.tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return losses, (way, *times, f"{ready:.0f} s", f"{time.perf_counter() - begin:.0f} s")


def curve_table(ways: list[str], curves: list[list[float]]) -> str:
    """Losses, each the mean of as many steps as lie between two rows."""
    every = max(len(curves[0]) // 10, 1)
    rows = [
        (
            f"{end - every + 1} to {end}",
            *(f"{statistics.mean(c[end - every : end]):.4f}" for c in curves),
        )
        for end in range(every, len(curves[0]) + 1, every)
    ]
    return markdown(("steps", *ways), rows)


def apart(curve: list[float], first: list[float]) -> str:
    """The mean distance of two curves at their end, and its sign."""
    differences = [a - b for a, b in zip(curve[-LAST:], first[-LAST:], strict=True)]
    size = statistics.mean(map(abs, differences))
    return f"{size:.4f} ({statistics.mean(differences):+.4f})"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", default=["bf16", "current"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    args = parser.parse_args()
    args.device = "cpu" if args.tiny else "cuda"
    if args.tiny:
        args.batch, args.length, args.steps, args.layers = 1, 64, min(args.steps, 20), 2
    found = [measure(way, args) for way in args.ways]
    curves = [losses for losses, _ in found]
    rows = [(*row, apart(losses, curves[0])) for losses, row in found]
    print(describe())
    print(f"{args.layers} layers, {args.batch} x {args.length} tokens, {args.steps} steps\n")
    header = ("way", "forward, backward", "step", "tokens/s", "peak", "ready in", "all", "apart")
    print(markdown(header, rows), curve_table(args.ways, curves), sep="\n\n")


if __name__ == "__main__":
    main()
