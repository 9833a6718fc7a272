"""Six families at small size, in bfloat16: parity, one training step, and step times.

python benchmarks/gpu_families.py               # CUDA: eager, and compiled with Inductor
python benchmarks/gpu_families.py --tiny        # a CPU will do: the tests' sizes, aot_eager

A step is forward and backward. `transformers` is the untouched model, `compiled` has every layer
handed to `layer.compile()`, `moe_compile` compiles by itself. Times are medians of interleaved
steps; errors are explained in parity.py, and are measured eager and compiled. Exits with 1 if any
is off, or if a model does not train.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe, markdown
from parity import differences
from torch import Tensor
from transformers import AutoModelForCausalLM

import moe_compile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.families import FAMILIES, build

COMMON = {"vocab_size": 4096, "hidden_size": 512, "max_position_embeddings": 4096}
"""The sizes that every family has, in place of the tests'."""
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_hidden_layers": 2,
        "moe_intermediate_size": 256,
        "num_experts": 32,
        "head_dim": 64,
        "intermediate_size": 1024,
        "mlp_only_layers": [0],
    },
    "mixtral": {"intermediate_size": 512, "num_local_experts": 8},
    "olmoe": {"intermediate_size": 256, "num_experts": 32},
    "deepseek_v3": {
        "num_hidden_layers": 2,
        "moe_intermediate_size": 256,
        "n_routed_experts": 32,
        "intermediate_size": 1024,
        "q_lora_rank": 128,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
    },
    "gpt_oss": {
        "intermediate_size": 256,
        "num_local_experts": 16,
        "head_dim": 64,
        "sliding_window": 128,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
        "moe_intermediate_size": 256,
        "n_routed_experts": 32,
        "head_dim": 64,
        "intermediate_size": 1024,
        "moe_shared_expert_intermediate_size": 256,
        "mamba_num_heads": 16,
        "mamba_head_dim": 64,
        "ssm_state_size": 64,
        "chunk_size": 64,
    },
}


def make(family: str, tiny: bool, device: str) -> Any:
    """A random model of the family; larger than the tests' unless `tiny`."""
    if tiny:
        model: Any = build(family, torch.bfloat16)
        return model.to(device)
    config = FAMILIES[family](**SIZES[family])
    for name, value in COMMON.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()


def step(model: Any, ids: Tensor) -> float:
    """Seconds of one forward and backward; gradients are left in place."""
    model.zero_grad(set_to_none=True)
    _wait(ids)
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    _wait(ids)
    return time.perf_counter() - start


def trains(model: Any, ids: Tensor) -> bool:
    """Whether one step of gradient descent gives a lower and finite loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    optimizer.zero_grad()
    first = loss()
    first.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return bool(loss().item() < first.item())


def measure(family: str, args: argparse.Namespace, ids: Tensor, backend: str) -> tuple[Any, bool]:
    """A row of the table, and whether all was well."""
    torch.compiler.reset()
    original = make(family, args.tiny, args.device)
    eager, optimized, compiled = (copy.deepcopy(original) for _ in range(3))
    moe_compile.optimize(eager, config=moe_compile.OptimizeConfig(compile=False))
    moe_compile.optimize(optimized, config=moe_compile.OptimizeConfig(compile={"backend": backend}))
    for layer in compiled.base_model.layers:
        layer.compile(backend=backend)
    models = {"hf": original, "hf compiled": compiled, "moe_compile": optimized}
    ready = {name: attempt(lambda m=model: step(m, ids)) for name, model in models.items()}
    runnable = {name: model for name, model in models.items() if ready[name] is None}
    times: dict[str, list[float]] = {name: [] for name in runnable}
    for _ in range(args.repeat + 2):
        for name, model in runnable.items():
            times[name].append(step(model, ids))
    learns = trains(copy.deepcopy(optimized), ids)
    torch.compiler.reset()  # code compiled before they were put there would not call parity's hooks
    found = [differences(original, model, ids) for model in (eager, optimized)]
    fine = not any(f.wrong for f in found) and learns and ready["moe_compile"] is None
    cells = [
        f"{statistics.median(times[name][2:]) * 1e3:.1f} ms" if name in times else ready[name]
        for name in models
    ]
    refused = sum(site.status == "refused" for site in moe_compile.report(optimized).sites)
    errors = [cell for f in found for cell in f.cells()]
    return (family, *errors, "yes" if learns else "NO", *cells, str(refused)), fine


def attempt(run: Callable[[], Any]) -> str | None:
    """Runs it; what went wrong, or None."""
    try:
        run()
    except Exception as error:  # a peer that cannot run is a cell of the table
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"
    return None


def _wait(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(SIZES))
    parser.add_argument("--tiny", action="store_true", help="the tests' sizes")
    parser.add_argument("--repeat", type=int, default=10)
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (2, 16) if args.tiny else (4, 512)
    backend = "inductor" if args.device == "cuda" else "aot_eager"
    ids = torch.randint(1, 128, shape, generator=torch.Generator().manual_seed(0)).to(args.device)
    print(describe())
    print(f"bfloat16, {shape[0]} rows of {shape[1]} tokens, compiled with {backend}\n", flush=True)
    rows: list[tuple[str, ...]] = []
    fine = True
    for family in args.families:
        row, good = measure(family, args, ids, backend)
        rows.append(row)
        fine &= good
        print(row[0], "ok" if good else "OFF", file=sys.stderr, flush=True)
    header = ("family", "loss, eager", "gradient, eager", "loss, compiled", "gradient, compiled")
    peers = ("transformers", "compiled", "moe_compile")
    print(markdown((*header, "trains", *peers, "refused"), rows))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
