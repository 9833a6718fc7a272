"""A truncated Qwen3-30B-A3B on one GPU, trained the same way by every peer.

python benchmarks/one_gpu.py                                # every peer
python benchmarks/one_gpu.py hf_compile moe_compile --layers 8

Real widths, `--layers` of 48 layers and the whole head, random weights, the real router, bfloat16
and fused AdamW; a process for each peer. `hf` is transformers with `grouped_mm`, `hf_compile` the
same with every layer compiled. Times are medians; a step is forward, backward and optimizer.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from machine import describe, markdown
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_compile

PEERS = ("hf", "hf_compile", "moe_compile")
VOCABULARY = 151936


def build(peer: str, layers: int) -> PreTrainedModel:
    """The model as the peer trains it."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        use_cache=False,
        **{"head_dim": 128},  # the config takes it without declaring it
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3MoeForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    if peer == "hf_compile":
        for layer in model.model.layers:
            layer.compile()
    return moe_compile.optimize(model) if peer == "moe_compile" else model


def measure(args: argparse.Namespace) -> tuple[str, ...]:
    """One peer's row."""
    model = build(args.peers[0], args.layers)
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (args.batch, args.length)
    ids = torch.randint(VOCABULARY, shape, device="cuda", generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    torch.cuda.reset_peak_memory_stats()
    passes, steps, losses = list[float](), list[float](), list[float]()
    for _ in range(args.warmup + args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.cuda.synchronize()
        passes.append(time.perf_counter() - start)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - start)
        losses.append(loss.item())
    both, step = (statistics.median(times[args.warmup :]) for times in (passes, steps))
    peak = torch.cuda.max_memory_allocated() / 2**30
    return (
        args.peers[0],
        f"{both * 1e3:.1f} ms",
        f"{step * 1e3:.1f} ms",
        f"{ids.numel() / both:,.0f}",
        f"{peak:.1f} GiB",
        f"{losses[0]:.4f}",
        f"{losses[-1]:.4f}",
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peers", nargs="*", default=list(PEERS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--one", action="store_true", help="measure the one peer named, here")
    args = parser.parse_args()
    if args.one:
        print("\t".join(measure(args)))
        return
    options = [
        f"--{n}={getattr(args, n)}" for n in ("layers", "batch", "length", "warmup", "steps")
    ]
    rows: list[tuple[str, ...]] = []
    for peer in args.peers:
        command = [sys.executable, __file__, peer, "--one", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(tuple(done.stdout.strip().splitlines()[-1].split("\t")))
    print(describe())
    print(f"{args.layers} layers, {args.batch} x {args.length} tokens\n")
    header = ("peer", "forward, backward", "step", "tokens/s", "peak", "first loss", "last loss")
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
