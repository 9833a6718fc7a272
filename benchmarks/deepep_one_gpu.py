"""DeepEP against all_to_all and the unsharded model, on several ranks that share one GPU.

python benchmarks/deepep_one_gpu.py                    # 2 ranks over gloo, one GPU, real kernels
python benchmarks/deepep_one_gpu.py --ranks 4 --sms 4
python benchmarks/deepep_one_gpu.py --tiny             # on a CPU, with the emulation in tests/

A model of Qwen3-30B-A3B's widths with few layers and a small vocabulary, bfloat16, random weights.
Every rank has tokens of its own, another number of them on each. The reference is the unsharded
model in one process, each rank's batch in turn: the loss and the logits of the rank's own batch, and
the mean over ranks of every gradient. A row is one way of running, and the worst error over all
ranks, relative L2: of the loss, of the logits, and of the worst gradient, which it names. `by` is
the provider that the report names: anything but the one asked for was refused, and the line under
the table says why. Then the ops alone: rows, weights and gradients equal to all_to_all's to the
bit, also with a rank that has no tokens. Fails (exit status 1) where an error exceeds `--limit`.
It measures correctness only: ranks on one GPU take turns, and their times mean nothing.

Options:
    --ranks N      processes: 2, 4 or 8 (2)
    --layers N     layers, each with experts (1)
    --tokens N     tokens of rank 0; rank r has N + 32 r (512)
    --sms N        SMs for DeepEP, even; the grids of all ranks must fit on the GPU (8)
    --backend B    gloo: groups of the CPU and DeepEP's kernels; all collectives of GPU tensors,
                   FSDP2's included, are then made by gloo. nccl: needs NCCL 2.30.7 preloaded
                   (LD_PRELOAD) and NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0
                   NCCL_MAX_CTAS=4 (gloo)
    --compile C    comma-separated ways: eager, or a backend of torch.compile (eager,inductor)
    --fsdp         shard the rest of the model with FSDP2; needs nccl on a GPU. Without it, the
                   gradients of what is no expert are averaged by hand (off)
    --limit X      the largest relative error allowed (0.05)
    --tiny         small widths, CPU, float gloo, tests/deep_ep_emulator.py in place of deep_ep

The GPU needs a V1 build of deep_ep, such as the wheel tokenspeed-deepep==1.2.1.post20251110, with
the library folder of nvidia.nvshmem on LD_LIBRARY_PATH.
"""

import argparse
import copy
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import describe, markdown
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.kernels.all_to_all import all_to_all_dispatch
from moe_compile.kernels.deep_ep import deep_ep_dispatch, destroy_buffers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests import deep_ep_emulator
from tests.pairs import error, step

REAL = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "head_dim": 128,
}
TINY = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "head_dim": 16,
}
VOCABULARY = 1024
Values = dict[str, Tensor]


def build(args: argparse.Namespace) -> Any:
    """The same model on every rank."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=args.layers,
        norm_topk_prob=True,
        use_cache=False,
        **(TINY if args.tiny else REAL),
    )
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3MoeForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    return model.to(args.device)


def call_of(rank: int, args: argparse.Namespace) -> dict[str, Any]:
    """A rank's own batch."""
    generator = torch.Generator().manual_seed(rank)
    shape = (1, args.tokens + 32 * rank)
    ids = torch.randint(VOCABULARY, shape, generator=generator).to(args.device)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def expected(model: Any, args: argparse.Namespace) -> Values:
    """The unsharded model's loss and logits for this rank, and gradients for all of them."""
    mean: Values = {}
    own: Values = {}
    for rank in range(args.ranks):
        values = step(model, **call_of(rank, args))
        if rank == dist.get_rank():
            own = {name: values[name] for name in ("loss", "logits")}
        for name in values.keys() - {"loss", "logits"}:
            mean[name] = mean.get(name, 0) + values[name].float() / args.ranks
    return own | mean


def whole(values: Values, *, averaged: bool) -> Values:
    """Gradients of full size, the mean over the ranks."""
    found: Values = {}
    for name, value in values.items():
        if isinstance(value, DTensor):
            found[name] = value.full_tensor()
        elif averaged or name in ("loss", "logits"):
            found[name] = value
        else:
            found[name] = value.float()
            dist.all_reduce(found[name])
            found[name] /= dist.get_world_size()
    return found


def one_way(
    model: nn.Module, dispatcher: Any, way: str, want: Values, args: argparse.Namespace
) -> tuple[tuple[str, ...], str, float]:
    """The row of one dispatcher and one way of compiling, the report's line, the worst error."""
    mesh = init_device_mesh(args.device, (args.ranks,), mesh_dim_names=("ep",))
    config = OptimizeConfig(
        dispatcher=dispatcher,
        fsdp=args.fsdp,
        compile=False if way == "eager" else {"backend": way},
    )
    mine = moe_compile.optimize(copy.deepcopy(model), mesh, config)
    report = moe_compile.report(mine)
    got = whole(step(mine, **call_of(dist.get_rank(), args)), averaged=args.fsdp)
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    errors = {name: error(value, want[name]) for name, value in got.items()}
    every: list[dict[str, float]] = [{}] * args.ranks
    dist.all_gather_object(every, errors)
    worst = {name: max(found[name] for found in every) for name in errors}
    gradients = {n: e for n, e in worst.items() if n not in ("loss", "logits")}
    name = max(gradients, key=gradients.__getitem__)
    line = next(line for line in str(report).splitlines() if line.startswith("Tokens travel"))
    row = (
        dispatcher,
        ", ".join(report.dispatchers),
        way,
        f"{worst['loss']:.1e}",
        f"{worst['logits']:.1e}",
        f"{gradients[name]:.1e}",
        name,
    )
    return row, line, max(worst.values())


def check_ops(empty: int | None, args: argparse.Namespace) -> str:
    """Both dispatches, and the gradients of tokens and weights, bit for bit."""
    sizes, rank = TINY if args.tiny else REAL, dist.get_rank()
    tokens = 0 if rank == empty else args.tokens + 32 * rank
    generator = torch.Generator().manual_seed(rank)
    shape = (tokens, sizes["num_experts"])
    weights, ids = torch.rand(shape, generator=generator).topk(sizes["num_experts_per_tok"])
    ids = torch.where(weights > 0.9, ids, -1).to(args.device)
    x = torch.randn(tokens, sizes["hidden_size"], generator=generator)
    leaves = x.bfloat16().to(args.device), weights.to(args.device)
    found: list[list[Tensor]] = []
    for send in (all_to_all_dispatch, deep_ep_dispatch):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        name: str = dist.group.WORLD.group_name  # type: ignore[union-attr]
        rows, local, theirs = send(inputs[0], ids, inputs[1], sizes["num_experts"], name)[:3]
        cotangents = rows.detach(), torch.where(local >= 0, theirs.detach(), 0)
        outs = rows.detach(), local, cotangents[1]
        found.append([*outs, *torch.autograd.grad((rows, theirs), inputs, cotangents)])
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    every = [False] * args.ranks
    dist.all_gather_object(every, same)
    return (
        "equal" if all(every) else f"DIFFERENT on ranks {[r for r, e in enumerate(every) if not e]}"
    )


def work(rank: int, store: str, args: argparse.Namespace) -> None:
    """One rank."""
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(args.ranks))
    if args.tiny:
        torch.set_num_threads(1)
        deep_ep_emulator.install()
    else:
        torch.cuda.set_device(0)
        from deep_ep import Buffer  # type: ignore[import-not-found]

        Buffer.set_num_sms(args.sms)
    dist.init_process_group(
        args.backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=args.ranks,
        timeout=timedelta(minutes=5),
    )
    model = build(args)
    want = expected(model, args)
    model.zero_grad()
    results = [
        one_way(model, dispatcher, way, want, args)
        for way in args.compile.split(",")
        for dispatcher in ("all_to_all", "deepep")
    ]
    ops = [check_ops(None, args), check_ops(args.ranks - 1, args)]
    destroy_buffers()
    if rank == 0:
        header = ("dispatcher", "by", "way", "loss", "logits", "worst gradient", "which")
        print(markdown(header, [row for row, _, _ in results]), flush=True)
        for line in dict.fromkeys(line for _, line, _ in results):
            print(line)
        print(f"ops alone: {ops[0]}; with a rank without tokens: {ops[1]}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    if max(worst for _, _, worst in results) > args.limit or ops != ["equal"] * 2:
        sys.exit(1)


def main() -> None:
    """Starts the ranks; rank 0 prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--sms", type=int, default=8)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--compile", default="eager,inductor")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--limit", type=float, default=0.05)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.device = "cpu" if args.tiny else "cuda"
    args.tokens = args.tokens or (24 if args.tiny else 512)
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (f"{folder}/store", args), args.ranks)


if __name__ == "__main__":
    main()
