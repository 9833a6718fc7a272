"""A truncated Qwen3-30B-A3B on one GPU, trained the same way by every peer.

python benchmarks/one_gpu.py                                # every peer
python benchmarks/one_gpu.py hf_compile moe_compile --layers 8

Real widths, `--layers` of 48 layers and the whole head, random weights, the real router, bfloat16
and fused AdamW; a process for each peer. `hf` is transformers with `grouped_mm`, `hf_compile` the
same with every layer compiled, `hf_liger` that with Liger's fused linear cross-entropy, and
`automodel` NeMo AutoModel, whose ports take no labels, so its loss is of bfloat16 logits, with
torch's kernels and its real gate; `moe_compile_graph` is moe_compile with a `GraphedStep`, and with
`_normed` and `_topk` in its name with the passes fuse_normed_rotary and raise_top_k. A peer that is
not installed is left out with a line; AutoModel wants another transformers: `AUTOMODEL` may name a
folder of packages that its process sees first. Times are medians; a step is forward, backward and
optimizer. `persistent` is what weights, gradients and the optimizer's states take, `peak` is
everything.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import describe, markdown
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

PEERS = ("hf", "hf_compile", "hf_liger", "automodel", "moe_compile", "moe_compile_graph")
Step = Callable[[Tensor], Tensor]
VOCABULARY = 151936


def config_of(layers: int, experts: int = 128) -> Qwen3MoeConfig:
    """The truncated model's."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        use_cache=False,
        **{"head_dim": 128, "architectures": ["Qwen3MoeForCausalLM"]},
    )


def build(peer: str, layers: int, experts: int = 128) -> PreTrainedModel:
    """The model as the peer trains it."""
    torch.manual_seed(0)
    config = config_of(layers, experts)
    if peer == "automodel":
        return automodel(config)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3MoeForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    if peer == "hf_liger":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe as apply

        off = dict.fromkeys(("rope", "rms_norm", "swiglu"), False)
        apply(fused_linear_cross_entropy=True, model=model, **off)
    if peer in ("hf_compile", "hf_liger"):
        for layer in model.model.layers:
            layer.compile()
    if peer.startswith("moe_compile"):
        import moe_compile

        passes = (step for name, step in asked_passes().items() if name in peer)
        pipeline = moe_compile.PIPELINE.after("dispatch_experts", *passes)
        return moe_compile.optimize(model, passes=pipeline)
    return model


def asked_passes() -> dict[str, Any]:
    """Passes that a peer's name asks for."""
    from moe_compile.passes import FuseNormedRotary, RaiseTopK

    return {"normed": FuseNormedRotary(), "topk": RaiseTopK()}


def automodel(config: Qwen3MoeConfig) -> PreTrainedModel:
    """NeMo AutoModel's port."""
    from nemo_automodel import NeMoAutoModelForCausalLM
    from nemo_automodel.components.models.common import BackendConfig

    kernels = dict.fromkeys(("linear", "rms_norm", "dispatcher"), "torch")
    backend = BackendConfig(attn="sdpa", experts="torch_mm", fake_balanced_gate=False, **kernels)
    return NeMoAutoModelForCausalLM.from_config(
        config, torch_dtype=torch.bfloat16, backend=backend
    ).train()


def step_of(peer: str, model: PreTrainedModel) -> Step:
    """Forward and backward of a batch, which give its loss."""
    if peer.endswith("_graph"):
        import moe_compile

        graphed = moe_compile.GraphedStep(model)
        return lambda ids: graphed(input_ids=ids, labels=ids)

    def step(ids: Tensor) -> Tensor:
        loss = loss_of(peer, model, ids)
        loss.backward()
        return loss.detach()

    return step


def loss_of(peer: str, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The loss of a batch."""
    if not peer.startswith("automodel"):
        return model(input_ids=ids, labels=ids).loss
    out = model(input_ids=ids)
    logits = getattr(out, "logits", out)[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))


def measure(args: argparse.Namespace) -> tuple[str, ...]:
    """One peer's row."""
    model = build(args.peers[0], args.layers)
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (args.batch, args.length)
    ids = torch.randint(VOCABULARY, shape, device="cuda", generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    step = step_of(args.peers[0], model)
    torch.cuda.reset_peak_memory_stats()
    passes, steps, losses = list[float](), list[float](), list[float]()
    for _ in range(args.warmup + args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step(ids)
        torch.cuda.synchronize()
        passes.append(time.perf_counter() - start)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - start)
        losses.append(loss.item())
    both, whole = (statistics.median(times[args.warmup :]) for times in (passes, steps))
    peak = torch.cuda.max_memory_allocated() / 2**30
    numbers = sum(p.numel() * p.element_size() for p in model.parameters())
    return (
        args.peers[0],
        f"{both * 1e3:.1f} ms",
        f"{whole * 1e3:.1f} ms",
        f"{ids.numel() / both:,.0f}",
        f"{4 * numbers / 2**30:.1f} GiB",
        f"{peak:.1f} GiB",
        f"{losses[0]:.4f}",
        f"{losses[-1]:.4f}",
    )


def environment(peer: str) -> dict[str, str]:
    """The variables of a peer's process."""
    folder = os.environ.get("AUTOMODEL") if peer == "automodel" else None
    paths = [folder, os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


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
        done = subprocess.run(command, capture_output=True, text=True, env=environment(peer))
        lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
        if done.returncode:
            print(f"{peer} did not run: {lines[-1]}")
        else:
            rows.append(tuple(lines[-1].split("\t")))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(describe())
    print(f"{args.layers} layers, {args.batch} x {args.length} tokens\n")
    header = ("peer", "forward, backward", "step", "tokens/s", "persistent", "peak")
    print(markdown((*header, "first loss", "last loss"), rows))


if __name__ == "__main__":
    main()
