"""What activation checkpointing saves and costs: a truncated Qwen3-30B-A3B, trained in every mode.

python benchmarks/checkpointing.py                          # on a GPU, in real widths
python benchmarks/checkpointing.py --tiny                   # anywhere; says only that it runs

Real widths, `--layers` of 48 layers and the whole head, random weights, bfloat16, no optimizer; a
process for each row. `hf` is the same model with transformers' own checkpointing around each layer,
which routes again. `kept` is what the forward leaves for the backward, `peak` the most of a step,
both without the weights; on a CPU, where nobody counts, `peak` is the whole process at its largest.
Times are medians of a forward and backward.
"""

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
from typing import Any

import torch
from machine import describe, markdown
from one_gpu import config_of
from timing import timed
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

import moe_compile

MODES = ("none", "selective", "full", "hf")
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 16,
}


def build(mode: str, layers: int, *, tiny: bool, compiled: bool) -> PreTrainedModel:
    """The model with a mode of checkpointing."""
    torch.manual_seed(0)
    config = config_of(layers)
    if tiny:
        config.update(TINY)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3MoeForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    own: Any = "none" if mode == "hf" else mode
    options: Any = {"backend": "aot_eager"} if compiled and tiny else compiled
    moe_compile.optimize(
        model, config=moe_compile.OptimizeConfig(activation_checkpointing=own, compile=options)
    )
    if mode == "hf":
        model.gradient_checkpointing_enable()
    return model


def measure(args: argparse.Namespace) -> tuple[str, ...]:
    """One row."""
    model = build(args.modes[0], args.layers, tiny=args.tiny, compiled=args.compiled)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.length), device=model.device)
    kept = list[int]()
    losses = list[Tensor]()

    def step() -> None:
        model.zero_grad()
        before = allocated()
        loss = model(input_ids=ids, labels=ids).loss
        kept.append(allocated() - before)
        loss.backward()
        losses.append(loss.detach())

    for _ in range(args.warmup):
        step()
    model.zero_grad()
    weights = allocated()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    milliseconds = statistics.median(timed(step) for _ in range(args.steps))
    return (
        args.modes[0],
        "yes" if args.compiled else "no",
        f"{milliseconds:.1f} ms",
        f"{kept[-1] / 2**30:.2f} GiB" if torch.cuda.is_available() else "-",
        f"{peak(weights) / 2**30:.2f} GiB",
        f"{losses[0].item():.4f}",
    )


def allocated() -> int:
    """Bytes on the GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak(weights: int) -> int:
    """The most bytes at a time: on the GPU beyond the weights, on a CPU of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() - weights
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modes", nargs="*", default=list(MODES))
    parser.add_argument("--tiny", action="store_true", help="a model for any machine")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--one", action="store_true", help="measure the one mode named, here")
    args = parser.parse_args()
    args.layers = args.layers or (2 if args.tiny else 8)
    args.length = args.length or (64 if args.tiny else 4096)
    if args.one:
        print("\t".join(measure(args)))
        return
    rows: list[tuple[str, ...]] = []
    for compiled, mode in itertools.product((False, True), args.modes):
        rows.append(row(mode, args, compiled))
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(describe())
    print(f"{args.layers} layers, {args.batch} x {args.length} tokens\n")
    header = ("checkpointing", "compiled", "forward, backward", "kept", "peak", "loss")
    print(markdown(header, rows))


def row(mode: str, args: argparse.Namespace, compiled: bool) -> tuple[str, ...]:
    """What a process of its own measures."""
    command = [sys.executable, __file__, mode, "--one"]
    command += [
        f"--{n}={getattr(args, n)}" for n in ("layers", "batch", "length", "warmup", "steps")
    ]
    command += ["--tiny"] * args.tiny + ["--compiled"] * compiled
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        return (mode, "yes" if compiled else "no", last[:80].replace("|", "/"), "-", "-", "-")
    return tuple(done.stdout.strip().splitlines()[-1].split("\t"))


if __name__ == "__main__":
    main()
