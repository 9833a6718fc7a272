"""A truncated Qwen3-30B-A3B on several GPUs, trained the same way by every peer.

python benchmarks/multi_gpu.py                                  # every peer, on all visible GPUs
python benchmarks/multi_gpu.py hf_compile moe_deepep --ranks 2 --batch 1 4
python benchmarks/multi_gpu.py --layers 48 --no-optimizer       # the whole model
python benchmarks/multi_gpu.py --check --curve 100 --dispatch   # instead of times of steps
python benchmarks/multi_gpu.py --tiny --ranks 2 hf moe_deepep   # on a CPU, over gloo

Real widths, `--layers` of 48 layers and the whole head, random weights, bfloat16; every rank has
tokens of its own, and each peer its own launch of all ranks. Peers:

    hf                transformers, `grouped_mm` and SDPA, FSDP2 for each layer and the rest
    hf_compile        the same with every layer compiled
    automodel         NeMo AutoModel with TransformerEngine and DeepEP, experts over all ranks
    automodel_torch   the same with torch's kernels, and DeepEP if TransformerEngine is there, whose
                      permutation its DeepEP path needs; else its torch dispatcher
    automodel_fake    automodel with its fake balanced gate, which is no router
    moe_all_to_all    moe_compile, tokens travel by all_to_all
    moe_deepep        by DeepEP
    moe_deepep_bound  by DeepEP, with `max_tokens_per_rank`: it never waits for the device
    moe_..._chunks    any of these three with the pass chunk_tokens, in two chunks
    moe_..._limited   with limit_picks, to twice an even share of the picks
    moe_..._normed    with fuse_normed_rotary
    moe_..._topk      with raise_top_k
    moe_..._shared    with overlap_shared_experts; it needs `--shared`; _chunks_shared is both
    moe_..._selective with activation_checkpointing="selective"
    moe_..._gathered  with fsdp={"reshard_after_forward": False}: all but the experts stays gathered
                      from a layer's forward to its backward
    moe_..._joined    with layers_per_unit=4
    moe_..._graph     with moe_compile's GraphedStep; by DeepEP it needs _bound

First forward and backward are measured with fixed weights and without an optimizer, then whole
steps with fused AdamW. Times are medians over the steps of the slowest rank, tokens/s are of
forward and backward for each GPU, peaks are of the rank with the largest, without and with the
optimizer's states, and losses the mean over ranks: the first of all, and the last with the
optimizer. All peers but AutoModel start from the same weights; its loss is of bfloat16 logits,
and its gradients are reduced in float32, as is its default. A peer that fails is left out with a
line. `AUTOMODEL` may name a folder of packages that AutoModel's processes see first.

Options:
    --ranks N       processes, a GPU for each (the visible GPUs)
    --layers N      layers (8)
    --batch N ...   sequences for each GPU; a table row for each number (1)
    --length N      tokens in a sequence (4096)
    --warmup N, --steps N   steps that are not measured, and that are (3, 8)
    --no-optimizer  forward and backward only
    --timeout S     seconds after which a launch is ended (400)
    --logs FOLDER   keep what every launch printed
    --shared N      another model, whose layers also have a shared expert of width N (0: none)
    --tiny          tiny widths, CPU, gloo, an emulation in tests/ in place of DeepEP

    --check         loss and gradients against the unsharded model, of at most two layers, whose
                    reference is the mean over the ranks' batches: relative L2 errors, the worst of
                    any rank; `against` is the worst error of anything against moe_all_to_all
    --curve N       N steps on a text's bytes, every peer from the same weights on the same data,
                    and how far each loss is from the first peer's (hf, moe_deepep)
    --trace FOLDER  a profiler's trace of one step of every peer, a file for each rank, and for how
                    many microseconds rank 0's tokens travelled while something was computed: on a
                    GPU, kernels (of all_to_all NCCL's, FSDP2's too); on a CPU, gloo's exchanges
                    beside products
    --dispatch      dispatch and combine alone: 8192 tokens of width 2048 on each rank, top 8 of
                    128 experts; bytes are the rows that a rank must send to others

DeepEP here is V1, such as the wheel tokenspeed-deepep==1.2.1.post20251110, with the library folder
of nvidia.nvshmem on LD_LIBRARY_PATH.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import describe, markdown
from multi_gpu_peers import build, finish_gradients, optimizer_of, shape_of
from one_gpu import environment, step_of
from torch import Tensor

PEERS = (
    "hf",
    "hf_compile",
    "automodel",
    "automodel_torch",
    "automodel_fake",
    "moe_all_to_all",
    "moe_deepep",
    "moe_deepep_bound",
)
NUMBERS = ("ranks", "layers", "length", "warmup", "steps", "curve", "shared")
FLAGS = ("optimizer", "check", "dispatch", "tiny")
HEADER = ("peer", "batch", "forward, backward", "tokens/s", "peak", "step", "peak with optimizer")


def main() -> None:
    """Prints the tables that were asked for, or does one rank's work."""
    args = parser().parse_args()
    args.ranks = args.ranks or torch.cuda.device_count()
    if args.one:
        work(args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was launched ends, too
    tables: list[str] = []
    if args.check:
        tables.append(check_table(args))
    if args.curve:
        tables.append(curve_table(args))
    if args.trace:
        tables.append(trace_table(args))
    if args.dispatch:
        tables.append(dispatch_table(args))
    tables = tables or [step_table(args)]
    print(describe())
    print(f"{args.ranks} ranks, {args.layers} layers, {args.length} tokens in a sequence")
    for table in tables:
        print(f"\n{table}")


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("peers", nargs="*")
    for name, default in zip(NUMBERS, (0, 8, 4096, 3, 8, 0, 0), strict=True):
        options.add_argument(f"--{name}", type=int, default=default)
    for name in FLAGS:
        start = name == "optimizer"
        options.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=start)
    options.add_argument("--batch", type=int, nargs="+", default=[1])
    options.add_argument("--timeout", type=float, default=400)
    options.add_argument("--logs", type=Path)
    options.add_argument("--trace", type=Path)
    options.add_argument("--one", type=Path, help="do a rank's work here, and write its result")
    return options


def launch(peer: str, batch: int, args: argparse.Namespace, **parts: Any) -> Any:
    """What rank 0 of a launch found; None, and a line, if it failed."""
    given = vars(args) | {"curve": 0, "check": False, "dispatch": False, "trace": None} | parts
    numbers = [f"--{name}={given[name]}" for name in NUMBERS]
    flags = [f"--{name}" if given[name] else f"--no-{name}" for name in FLAGS]
    flags += [f"--trace={given['trace'].resolve()}"] if given["trace"] else []
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        rank = (__file__, peer, f"--batch={batch}", f"--one={result}", *numbers, *flags)
        name = "-".join((peer, str(batch), *parts))
        log = Path(args.logs or folder, f"{name}.log")
        ended = wait([sys.executable, *torchrun, *rank], peer, log, args.timeout)
        found = json.loads(result.read_text()) if result.exists() else None
        said = "ran" if found is not None else f"did not run: {reason(log, ended)}"
    print(f"{name} {said} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    if found is not None:
        print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def wait(command: list[str], peer: str, log: Path, timeout: float) -> bool:
    """Runs a command, its output in a file; whether it ended in time. Its ranks end with it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = environment("automodel" if peer.startswith("automodel") else peer)
    with log.open("w") as file:
        started = subprocess.Popen(
            command, stdout=file, stderr=file, env=variables, start_new_session=True
        )
        try:
            started.wait(timeout)
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGTERM)
                time.sleep(5)
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


def reason(log: Path, ended: bool) -> str:
    """The line of a log that says most."""
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [
        line for line in lines if re.search(r"^(\[rank\d+\]: ?)?[\w.]*(Error|Refuse)\b", line)
    ]
    said = (errors or lines or ["nothing was printed"])[0 if errors else -1]
    return said if ended else f"it took too long; {said}"


def work(args: argparse.Namespace) -> None:
    """One rank of a launch; rank 0 writes what was found."""
    set_up(args)
    if args.trace:
        from multi_gpu_trace import trace

        found: Any = trace(args)
    elif args.check or args.curve or args.dispatch:
        import multi_gpu_checks as checks

        part = checks.check if args.check else checks.curve if args.curve else checks.dispatch
        found = part(args)
    else:
        found = measure(args)
    dist.barrier()
    if dist.get_rank() == 0:
        args.one.write_text(json.dumps(found))
    tear_down()


def set_up(args: argparse.Namespace) -> None:
    """The rank's device and process group; what the ranks' functions need beside the options."""
    args.device = "cpu" if args.tiny else "cuda"
    args.backend = "aot_eager" if args.tiny else "inductor"
    args.length = min(args.length, 32) if args.tiny else args.length
    args.bound = args.batch[0] * args.length
    if args.tiny:
        torch.set_num_threads(1)
        from deepep_one_gpu import deep_ep_emulator

        deep_ep_emulator.install()
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if args.tiny else "nccl")


def tear_down() -> None:
    """Frees DeepEP's buffers while the process group is there."""
    deep_ep = sys.modules.get("moe_compile.kernels.deep_ep")
    if deep_ep is not None:
        deep_ep.destroy_buffers()
    dist.barrier()
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One peer's times, peaks and losses."""
    peer = args.peers[0]
    model = build(peer, args)
    generator = torch.Generator().manual_seed(dist.get_rank() + 1)
    shape = args.batch[0], args.length
    ids = torch.randint(shape_of(args).vocab_size, shape, generator=generator).to(args.device)
    step = step_of(peer, model)
    both, losses, peak = steps(peer, model, partial(step, ids), None, args)
    found: dict[str, Any] = {"passes": both, "tokens": ids.numel() / both, "peak": peak}
    if args.optimizer:
        optimizer = optimizer_of(model, 1e-5)
        found["step"], more, found["peak_with"] = steps(
            peer, model, partial(step, ids), optimizer, args
        )
        losses += more
    return found | {"first": losses[0], "last": losses[-1]}


def steps(
    peer: str, model: Any, step: Callable[[], Tensor], optimizer: Any, args: argparse.Namespace
) -> tuple[float, list[float], float]:
    """The median time of the slowest rank, the mean losses, and the largest peak in GiB."""
    times, losses = list[float](), list[Tensor]()
    if not args.tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.warmup + args.steps):
        dist.barrier()
        start = now(args)
        loss = step()
        if optimizer is not None:
            finish_gradients(peer, model, args)
            optimizer.step()
        times.append(now(args) - start)
        model.zero_grad(set_to_none=True)
        losses.append(loss.float())
    peak = 0 if args.tiny else torch.cuda.max_memory_allocated() / 2**30
    *slowest, largest = over_ranks([*times, peak], "max", args)
    mean = over_ranks(torch.stack(losses).tolist(), "sum", args)
    return statistics.median(slowest[args.warmup :]), [x / args.ranks for x in mean], largest


def now(args: argparse.Namespace) -> float:
    """The time at which the device is through."""
    if not args.tiny:
        torch.cuda.synchronize()
    return time.perf_counter()


def over_ranks(numbers: list[float], how: str, args: argparse.Namespace) -> list[float]:
    """The largest or the sum of each number over all ranks."""
    found = torch.tensor(numbers, dtype=torch.float64, device=args.device)
    dist.all_reduce(found, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
    return found.tolist()


def step_table(args: argparse.Namespace) -> str:
    """A row for every peer and batch."""
    rows: list[tuple[str, ...]] = []
    for batch in args.batch:
        for peer in args.peers or PEERS:
            found = launch(peer, batch, args)
            if found is not None:
                rows.append(step_row(peer, batch, found))
    return markdown((*HEADER, "first loss", "last loss"), rows)


def step_row(peer: str, batch: int, found: dict[str, float]) -> tuple[str, ...]:
    """One line of the table."""
    label = f"{peer} (no router)" if peer == "automodel_fake" else peer
    optimizer = ("-", "-")
    if "step" in found:
        optimizer = f"{found['step'] * 1e3:.1f} ms", f"{found['peak_with']:.1f} GiB"
    return (
        label,
        str(batch),
        f"{found['passes'] * 1e3:.1f} ms",
        f"{found['tokens']:,.0f}",
        f"{found['peak']:.1f} GiB",
        *optimizer,
        f"{found['first']:.4f}",
        f"{found['last']:.4f}",
    )


def check_table(args: argparse.Namespace) -> str:
    """Errors of every peer that has transformers' parameters, all in one launch."""
    peers = [peer for peer in args.peers or PEERS if not peer.startswith("automodel")]
    rows = launch(",".join(peers), 1, args, check=True) or []
    header = ("peer", "compiled", "loss", "logits", "worst gradient", "which", "against")
    return markdown(header, [tuple(row) for row in rows])


def curve_table(args: argparse.Namespace) -> str:
    """Losses side by side, at most eleven of them, and the differences over all steps."""
    peers = args.peers or ["hf", "moe_deepep"]
    found = {peer: launch(peer, args.batch[0], args, curve=args.curve) for peer in peers}
    losses = {peer: curve for peer, curve in found.items() if curve is not None}
    if not losses:
        return "no peer ran"
    shown = sorted({*range(0, args.curve, max(args.curve // 10, 1)), args.curve - 1})
    rows = [(str(i), *(f"{curve[i]:.4f}" for curve in losses.values())) for i in shown]
    base = next(iter(losses.values()))
    apart = [[abs(a - b) for a, b in zip(curve, base, strict=True)] for curve in losses.values()]
    rows.append(("largest difference", *(f"{max(each):.4f}" for each in apart)))
    rows.append(("mean difference", *(f"{statistics.mean(each):.4f}" for each in apart)))
    return markdown(("step", *losses), rows)


def trace_table(args: argparse.Namespace) -> str:
    """What of the communication of each peer ran beside computation."""
    times = ("travels", "beside computation", "computation", "step")
    header = ("peer", "batch", *times, "longest beside each other")
    rows = [
        (peer, str(batch), *(f"{microseconds:,.0f} us" for microseconds in found[:-1]), found[-1])
        for batch in args.batch
        for peer in args.peers or PEERS
        if (found := launch(peer, batch, args, trace=args.trace)) is not None
    ]
    return markdown(header, rows)


def dispatch_table(args: argparse.Namespace) -> str:
    """Dispatch and combine alone, in one launch."""
    rows = launch("moe_deepep", 1, args, dispatch=True) or []
    header = ("dispatcher", "MB there and back", "forward", "GB/s", "with backward", "GB/s")
    return markdown(header, [tuple(row) for row in rows])


if __name__ == "__main__":
    main()
