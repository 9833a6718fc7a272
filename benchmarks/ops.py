"""Every canonical op at Qwen3-30B-A3B's shapes on one GPU, beside transformers' and others' code.

python benchmarks/ops.py                                 # every op, 16,384 tokens, bfloat16
python benchmarks/ops.py rms_norm attention --tokens 8192
python benchmarks/ops.py --tiny                          # a CPU will do: tiny sizes, aot_eager

`hf` is transformers' formula, `moe_compile` the implementation that the library lowers the op to;
each eager and compiled by itself. TransformerEngine (`te`) and Liger are timed where they can be
imported. Beside the ops: `add_norm` (the sum with the residual, and its norm) and `qk_norm_rotary`
(norm and rotary of query and key; by one kernel, or as two ops), as models call them. Times are
means of calls that were launched before the device began, so without the launches. GB/s count each
input read and each output written once, TFLOP/s the products alone, attention's without what its
mask hides; the forward of the loss makes no gradients. The shares are of a copy of 1 GiB and of an
8192^3 product, measured first. Errors are relative L2 against the op's first way, the worst of
outputs and gradients.
"""

import argparse
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
from machine import describe, markdown
from op_cases import CASES, Case
from op_sizes import TINY, Sizes
from timing import failure, milliseconds, worst
from torch import Tensor

HEADER = (
    *("op", "way", "forward", "rate", "share"),
    *("forward, backward", "rate", "share", "worst error"),
)
SCALES = {"GB/s": 1e6, "TFLOP/s": 1e9}
"""What a rate in 1/ms is divided by."""


def ceilings(device: str) -> dict[str, float]:
    """The rates that no op can pass by much: a copy's and a product's."""
    side, length = (8192, 2**29) if device == "cuda" else (256, 2**20)
    x, y = (torch.empty(length, dtype=torch.bfloat16, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    copied = 4 * length / milliseconds(lambda: y.copy_(x), ahead=True)
    multiplied = 2 * side**3 / milliseconds(lambda: a @ b, ahead=True)
    return {"GB/s": copied / SCALES["GB/s"], "TFLOP/s": multiplied / SCALES["TFLOP/s"]}


def copied(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The same values for a way that may work in place."""
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


def outputs(run: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """What it returns, as a list."""
    found = run(*inputs)
    return list(found) if isinstance(found, tuple) else [found]


def step(run: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Every output and every gradient."""
    found = outputs(run, inputs)
    wanted = [t for t in inputs if t.requires_grad]
    return [*found, *torch.autograd.grad(found, wanted, grads[: len(found)])]


def upstream(case: Case) -> list[Tensor]:
    """The gradients of a case's outputs."""
    first, *_ = case.ways.values()
    torch.manual_seed(2)
    with torch.no_grad():
        found = outputs(first, copied(case.inputs))
    return [torch.randn_like(t) if t.dim() else torch.ones_like(t) for t in found]


def ways(case: Case, backend: str) -> dict[str, Callable[..., Any]]:
    """Eager ones, each followed by its compiled self."""
    found = dict[str, Callable[..., Any]]()
    for name, run in case.ways.items():
        found[name] = run
        if name in case.compiled:
            found[f"{name}, compiled"] = torch.compile(run, dynamic=False, backend=backend)
    return found


def cells(case: Case, milliseconds: float, work: float, limits: dict[str, float]) -> list[str]:
    """A time, its rate, and the rate's share of what can be reached."""
    rate = work / milliseconds / SCALES[case.unit]
    share = rate / limits[case.unit]
    return [f"{milliseconds:.3f} ms", f"{rate:,.0f} {case.unit}", f"{share:.0%}"]


def measure(
    case: Case,
    run: Callable[..., Any],
    grads: list[Tensor],
    wanted: list[Tensor],
    limits: dict[str, float],
) -> list[str]:
    """The numbers of one way; `wanted` is filled by the first."""
    torch._dynamo.reset()
    inputs, grads = copied(case.inputs), copied(tuple(grads))
    found = [t.detach().clone() for t in step(run, inputs, grads)]
    if not wanted:
        wanted += found
    error = worst(found, wanted)
    del found
    repeats = 20 if inputs[0].is_cuda else 1
    with torch.no_grad():
        forward = milliseconds(lambda: run(*inputs), repeats, ahead=True)
    both = milliseconds(lambda: step(run, inputs, grads), repeats, ahead=True)
    times = zip((forward, both), case.work, strict=True)
    return [cell for pair in times for cell in cells(case, *pair, limits)] + [f"{error:.1e}"]


def rows(name: str, sizes: Sizes, limits: dict[str, float], backend: str) -> list[tuple[str, ...]]:
    """The rows of an op."""
    torch.manual_seed(0)
    case, wanted, found = CASES[name](sizes), list[Tensor](), list[tuple[str, ...]]()
    grads = upstream(case)
    for way, run in ways(case, backend).items():
        gc.collect()
        if sizes.device == "cuda":
            torch.cuda.empty_cache()
        try:
            found.append((name, way, *measure(case, run, grads, wanted, limits)))
        except Exception as error:  # a way that cannot run is a row of the table
            found.append((name, way, failure(error), *[""] * (len(HEADER) - 3)))
        print(" | ".join(found[-1]), flush=True)
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", default=list(CASES), metavar="|".join(CASES))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU")
    args = parser.parse_args()
    sizes = TINY
    if not args.tiny:
        sizes = dataclasses.replace(Sizes(), tokens=args.tokens, length=args.length)
    backend = "aot_eager" if args.tiny else "inductor"
    limits = ceilings(sizes.device)
    found = [row for name in args.ops for row in rows(name, sizes, limits, backend)]
    print(f"\n{describe()}")
    print(f"{sizes.tokens} tokens, bfloat16; ", end="")
    print(", ".join(f"{rate:,.0f} {unit}" for unit, rate in limits.items()) + " can be reached\n")
    print(markdown(HEADER, found))


if __name__ == "__main__":
    main()
