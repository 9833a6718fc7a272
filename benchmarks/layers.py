"""Decoder layers of six families at their real widths on one GPU, forward and backward.

python benchmarks/layers.py                              # six families, 80 GB
python benchmarks/layers.py gpt_oss mixtral --profile
python benchmarks/layers.py olmoe_whole                  # 16 layers, whole vocabulary: 140 GB
python benchmarks/layers.py --tiny                       # a CPU will do: tiny widths, aot_eager

As many layers as fit, a vocabulary of 1024, random weights, the real router, bfloat16; a process
for each family. `hf_compile` is transformers with `grouped_mm` and the attention that it picks,
every layer compiled by `layer.compile()`; `moe_compile` is `optimize(model)`. A step is forward
and backward; times are medians. Both have the same weights and are compared in their first step
with uncompiled transformers in bfloat16, routing included: rounding moves tokens between experts,
so neither error is zero, and what says something is one beside the other. Loss errors are relative;
gradient errors are relative in L2 norm, the median over parameters and the worst. A cell says what
failed. Without mamba_ssm, Mamba2 in transformers wants 17 GiB at once for 4096 tokens: nemotron_h
gets two rows of 2048.
"""

import argparse
import copy
import gc
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from machine import describe, markdown
from timing import failure, relative_error, show_kernels, timed
from torch import Tensor
from transformers import AutoModelForCausalLM

import moe_compile

PEERS = ("hf_compile", "moe_compile")
HEADER = (
    *("family", "layers", "parameters", "tokens", *PEERS, "ratio"),
    *(f"{what}, {peer}" for what in ("peak", "loss", "gradient") for peer in PEERS),
)
SMALL = {"vocab_size": 1024, "eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    """A config: what differs from the class's defaults, and the rows and tokens of a batch."""

    config: str
    sizes: dict[str, Any]
    shape: tuple[int, int] = (2, 4096)
    tiny: dict[str, Any] = field(default_factory=dict[str, Any])


OLMOE = {"intermediate_size": 1024}
FAMILIES: dict[str, Family] = {
    "gpt_oss": Family(
        "GptOssConfig",
        SMALL | {"num_hidden_layers": 2, "num_local_experts": 32},
        tiny={"sliding_window": 8},
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        SMALL | {"num_hidden_layers": 2, "first_k_dense_replace": 1},
        tiny={"num_key_value_heads": 4},
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        SMALL
        | {
            "layers_block_type": [
                *("linear_attention", "moe", "linear_attention"),
                *("full_attention", "moe"),
            ],
            "hidden_size": 2688,
            "num_key_value_heads": 2,
            "mamba_num_heads": 64,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "routed_scaling_factor": 2.5,
        },
        (2, 2048),
    ),
    "mixtral": Family("MixtralConfig", SMALL | {"num_hidden_layers": 4}),
    "olmoe": Family("OlmoeConfig", SMALL | OLMOE | {"num_hidden_layers": 8}),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        SMALL | {"num_hidden_layers": 4},
        tiny={"layer_types": ["linear_attention", "full_attention"]},
    ),
    "olmoe_whole": Family("OlmoeConfig", OLMOE),
}
"""gpt-oss-20b, DeepSeek-V3, Nemotron-3-Nano-30B-A3B, Mixtral-8x7B, OLMoE-1B-7B, Qwen3-Next-80B."""
DEFAULT = [name for name in FAMILIES if name != "olmoe_whole"]

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "eos_token_id": 2,
}
"""Replaces the sizes that a config has, to prove that this script runs; then `Family.tiny` does."""


@dataclass(frozen=True)
class Result:
    """What a peer's run gave."""

    time: str
    milliseconds: float = float("nan")
    peak: str = "-"
    loss: str = "-"
    gradient: str = "-"


@dataclass(frozen=True)
class Truth:
    """What uncompiled transformers gives, its gradients in the host's memory."""

    loss: float
    gradients: dict[str, Tensor]


def config_of(family: Family, tiny: bool) -> Any:
    """The family's config."""
    kind = getattr(transformers, family.config)
    sizes = dict(family.sizes)
    if tiny:
        known = vars(kind(**sizes))
        sizes |= {n: v for n, v in TINY.items() if n in known} | family.tiny
    return kind(use_cache=False, **sizes)


def build(family: Family, args: argparse.Namespace) -> Any:
    """The model with random weights, as transformers has it."""
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config_of(family, args.tiny), dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    return model.train()


def twin(model: Any) -> Any:
    """Another model of the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def prepared(peer: str, model: Any, backend: str) -> Any:
    """The model as the peer trains it."""
    torch.compiler.reset()
    if peer == "moe_compile":
        config = moe_compile.OptimizeConfig(compile={"backend": backend})
        return moe_compile.optimize(model, config=config)
    for layer in model.base_model.layers:
        layer.compile(backend=backend)
    return model


def step(model: Any, ids: Tensor) -> Tensor:
    """The loss; gradients are left in place."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def gradients(model: Any) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def truth(model: Any, ids: Tensor) -> Truth:
    """One step of the untouched model."""
    loss = step(model, ids)
    return Truth(loss.item(), {n: g.cpu() for n, g in gradients(model).items()})


def errors(model: Any, loss: Tensor, wanted: Truth | None) -> tuple[str, str]:
    """Those of the loss and of the gradients, as cells."""
    if wanted is None:
        return "-", "-"
    found = gradients(model)
    assert found.keys() == wanted.gradients.keys(), "other parameters have a gradient"
    each = {n: relative_error(g, wanted.gradients[n]) for n, g in found.items()}
    name = max(each, key=lambda n: each[n])
    print(f"worst gradient: {name} {each[name]:.1e}", file=sys.stderr)
    spread = f"{statistics.median(each.values()):.1e}, {each[name]:.1e}"
    return f"{abs(loss.item() / wanted.loss - 1):.1e}", spread


def measure(
    peer: str, model: Any, ids: Tensor, wanted: Truth | None, args: argparse.Namespace
) -> Result:
    """Errors in the first step, then times and memory, then kernels if asked for."""
    model = prepared(peer, twin(model), args.backend)
    cells = errors(model, step(model, ids), wanted)
    times = list[float]()
    for number in range(args.warmup + args.steps):
        if number == args.warmup and args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model.zero_grad(set_to_none=True)
        times.append(timed(lambda: step(model, ids)))
    time = statistics.median(times[args.warmup :])
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0
    if args.profile:
        model.zero_grad(set_to_none=True)
        show_kernels(f"{args.families[0]}, {peer}", lambda: step(model, ids), steps=1, top=12)
    return Result(f"{time:.1f} ms", time, f"{peak:.1f} GiB", *cells)


def clear(model: Any) -> None:
    """Frees the gradients, and what a failed run has left."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(args: argparse.Namespace) -> tuple[str, ...]:
    """A family's row."""
    family = FAMILIES[args.families[0]]
    model = build(family, args)
    default = (2, 16) if args.tiny else family.shape
    shape = args.batch or default[0], args.length or default[1]
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=draw).to(args.device)
    wanted: Truth | None = None
    try:
        wanted = truth(model, ids)
    except Exception as error:
        print(f"no reference: {failure(error)}", file=sys.stderr)
    found = list[Result]()
    for peer in PEERS:
        clear(model)
        try:
            found.append(measure(peer, model, ids, wanted, args))
        except Exception as error:  # a peer that cannot run is a cell of the table
            found.append(Result(failure(error)))
    size = sum(p.numel() for p in model.parameters()) / 1e9
    layers = str(len(model.base_model.layers))
    first = args.families[0], layers, f"{size:.2f} B", f"{shape[0]} x {shape[1]}"
    ratio = found[0].milliseconds / found[1].milliseconds
    times = *(r.time for r in found), f"{ratio:.2f}"
    rest = (getattr(r, what) for what in ("peak", "loss", "gradient") for r in found)
    return *first, *times, *rest


def row(name: str, options: list[str], timeout: float) -> tuple[str, ...]:
    """The family's row, from a process of its own."""
    command = [sys.executable, __file__, name, "--one", *options]
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | os.environ
    empty = ("",) * (len(HEADER) - 2)
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=environment, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return name, f"took more than {timeout:.0f} s", *empty
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        return name, f"failed with {done.returncode}: see above", *empty
    print("\n".join(lines[:-1]))
    return tuple(lines[-1].split("\t"))


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", default=DEFAULT, metavar="|".join(FAMILIES))
    parser.add_argument("--batch", type=int, help="rows; 2 by default")
    parser.add_argument("--length", type=int, help="tokens of a row; 4096 by default")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a family")
    parser.add_argument("--profile", action="store_true", help="print the 12 longest kernels")
    parser.add_argument("--tiny", action="store_true", help="tiny widths, on the CPU")
    parser.add_argument("--one", action="store_true", help="measure the one family named, here")
    args = parser.parse_args()
    args.device, args.backend = ("cpu", "aot_eager") if args.tiny else ("cuda", "inductor")
    return args


def main() -> None:
    """Prints the table."""
    args = options()
    if args.one:
        print("\t".join(compare(args)))
        return
    passed = [f"--{n}={v}" for n in ("batch", "length") if (v := getattr(args, n)) is not None]
    passed += [f"--{n}={getattr(args, n)}" for n in ("warmup", "steps")]
    passed += [f"--{n}" for n in ("profile", "tiny") if getattr(args, n)]
    rows = list[tuple[str, ...]]()
    for name in args.families:
        rows.append(row(name, passed, args.timeout))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(describe())
    print(markdown(HEADER, rows))


if __name__ == "__main__":
    main()
