"""A step on the CPU, uncompiled: moe_compile against transformers' grouped_mm.

python benchmarks/cpu_step.py

A step is the forward and backward of a small model. One process; the two models have the same
weights and take turns, so that whatever else the machine does hits both. The loss and all gradients
are compared in the same run (see parity.py).
"""

import argparse
import copy
import statistics
import sys
import time

import torch
from machine import describe, markdown
from parity import differences
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import moe_compile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(dtype: torch.dtype) -> PreTrainedModel:
    """Four layers of 16 experts with random weights."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=256,
        moe_intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def seconds(model: PreTrainedModel, ids: Tensor) -> float:
    """One forward and backward."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    return time.perf_counter() - start


def compare(dtype: torch.dtype, ids: Tensor, repeat: int) -> tuple[tuple[str, ...], bool]:
    """A row of the table, and whether loss and gradients are within twice the original's error."""
    theirs = build(dtype)
    ours = copy.deepcopy(theirs)
    moe_compile.optimize(ours, config=moe_compile.OptimizeConfig(compile=False))
    pairs = [(seconds(theirs, ids), seconds(ours, ids)) for _ in range(repeat + 2)][2:]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    found = differences(theirs, ours, ids)
    row = (
        str(dtype).removeprefix("torch."),
        f"{medians[0] * 1e3:.0f} ms",
        f"{medians[1] * 1e3:.0f} ms",
        f"{medians[0] / medians[1]:.2f}",
        *found.cells(),
    )
    return row, not found.wrong


def main() -> None:
    """Prints the table; exits with 1 if a loss or a gradient is off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    ids = torch.randint(1024, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    print(describe())
    results = [compare(dtype, ids, args.repeat) for dtype in DTYPES.values()]
    header = ("dtype", "transformers", "moe_compile", "ratio", "loss error", "gradient error")
    print(markdown(header, [row for row, _ in results]))
    sys.exit(0 if all(fine for _, fine in results) else 1)


if __name__ == "__main__":
    main()
