"""DeepEP against all_to_all and the unsharded model, on several ranks that share the GPUs.

python benchmarks/deepep_one_gpu.py                    # 2 ranks over gloo, one GPU, real kernels
python benchmarks/deepep_one_gpu.py --ranks 4 --sms 4
python benchmarks/deepep_one_gpu.py --tiny             # on a CPU, with the emulation in tests/

A model of Qwen3-30B-A3B's widths with few layers and a small vocabulary, bfloat16, random weights.
Every rank has tokens of its own, another number of them on each. The reference is the unsharded
model in one process, each rank's batch in turn: loss and logits of the rank's own batch, and the
mean over ranks of every gradient. A row is one way of running, with the worst error over all ranks
(relative L2) of the loss, of the logits, and of the worst gradient, which it names. Routing is the
way's own: where compiled code rounds otherwise, a token near a tie may go to another expert, with
either dispatcher. So the last column compares with all_to_all run the same way: the worst error of
anything. `by` is the provider that took the dispatch: if it is not the one asked for, the line
under the table says why. Then the ops alone: rows, weights and gradients equal to all_to_all's to
the bit, also with a rank that has no tokens. With `--worst`, DeepEP is given the largest number of
tokens and must not wait for the device: see `waits`. The exit status is 1 where the ops differ,
DeepEP was refused, something waits, the last column exceeds `--limit`, or DeepEP's error is above
all_to_all's by more. It measures correctness only: ranks on one GPU take turns, and their times
mean nothing. Rank r is on GPU r modulo the number of visible ones.

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
    --elastic      DeepEP V2, `ElasticBuffer`, also where `Buffer` is there; it has no use for --sms
    --worst        OptimizeConfig(max_tokens_per_rank=...), and a check that nothing waits (off)
    --limit X      the largest relative error allowed between the dispatchers (0.02)
    --tiny         small widths, CPU, gloo, an emulation in tests/ in place of deep_ep

The GPU needs a V1 build of deep_ep, such as the wheel tokenspeed-deepep==1.2.1.post20251110, with
the library folder of nvidia.nvshmem on LD_LIBRARY_PATH. `--elastic` needs V2, such as
tokenspeed-deepep==2.1.0.post20260801, NCCL 2.30.7 with its headers, and nvcc.
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
from moe_compile import OptimizeConfig, ops
from moe_compile.kernels.all_to_all import all_to_all_dispatch
from moe_compile.kernels.deep_ep import deep_ep_dispatch, destroy_buffers
from moe_compile.kernels.deep_ep_elastic import elastic_dispatch
from moe_compile.kernels.deep_ep_sms import library
from moe_compile.providers.deepep import DeepEPProvider
from moe_compile.providers.torch import TorchProvider

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests import deep_ep_elastic_emulator, deep_ep_emulator
from tests.pairs import step

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
    "hidden_size": 256,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "head_dim": 16,
}
VOCABULARY = 1024
Values = dict[str, Tensor]
Rows = tuple[list[tuple[str, ...]], list[str], bool]


def sizes_of(args: argparse.Namespace) -> dict[str, int]:
    """The model's widths."""
    return TINY if args.tiny else REAL


def build(args: argparse.Namespace) -> Any:
    """The same model on every rank."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=args.layers,
        norm_topk_prob=True,
        use_cache=False,
        **sizes_of(args),
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = Qwen3MoeForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    return model


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
            found[name] = value.full_tensor() if averaged else gathered(value)
        elif averaged or name in ("loss", "logits"):
            found[name] = value
        else:
            found[name] = value.float()
            dist.all_reduce(found[name])
            found[name] /= dist.get_world_size()
    return found


def gathered(experts: DTensor) -> Tensor:
    """All ranks' experts, by way of the CPU: gloo crashes in `full_tensor` on GPU tensors."""
    local = experts.to_local()
    parts = [torch.empty(local.shape) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.float().cpu())
    return torch.cat(parts).to(local.device)


def error(value: Tensor, reference: Tensor) -> float:
    """The relative L2 error, on the device."""
    reference = reference.float()
    norms = (torch.linalg.vector_norm(t) for t in (value.float() - reference, reference))
    return float(torch.div(*norms))


def run(
    model: nn.Module, dispatcher: Any, way: str, args: argparse.Namespace
) -> tuple[Values, moe_compile.Report]:
    """Loss, logits and whole gradients of one step, and the report."""
    mesh = init_device_mesh(args.device, (args.ranks,), mesh_dim_names=("ep",))
    config = OptimizeConfig(
        dispatcher=dispatcher,
        max_tokens_per_rank=args.bound,
        fsdp=args.fsdp,
        compile=False if way == "eager" else {"backend": way},
    )
    mine = moe_compile.optimize(copy.deepcopy(model), mesh, config)
    got = whole(step(mine, **call_of(dist.get_rank(), args)), averaged=args.fsdp)
    return got, moe_compile.report(mine)


def say(what: str) -> None:
    """Progress, from rank 0."""
    if dist.get_rank() == 0:
        print(what, file=sys.stderr, flush=True)


def errors_of(got: Values, want: Values) -> dict[str, float]:
    """The worst error of everything over all ranks."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    every: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, {name: error(value, want[name]) for name, value in got.items()})
    return {name: max(found[name] for found in every) for name in got}


def compare(model: nn.Module, way: str, want: Values, args: argparse.Namespace) -> Rows:
    """Both dispatchers in one way: their rows, the report's lines, and whether all is well."""
    base, base_report = run(model, "all_to_all", way, args)
    say(f"all_to_all ran, {way}")
    ours, our_report = run(model, "deepep", way, args)
    say(f"deepep ran, {way}")
    base_errors, our_errors = errors_of(base, want), errors_of(ours, want)
    between = max(errors_of(ours, base).values())
    rows = [
        ("all_to_all", ", ".join(base_report.dispatchers), way, *cells(base_errors), "-"),
        ("deepep", ", ".join(our_report.dispatchers), way, *cells(our_errors), f"{between:.1e}"),
    ]
    text = f"{base_report}\n{our_report}".splitlines()
    lines = [line for line in text if line.startswith("Tokens travel")]
    above = max(our_errors[name] - base_errors[name] for name in want)
    fine = max(between, above) <= args.limit and list(our_report.dispatchers) == ["deepep"]
    return rows, lines, fine


def cells(errors: dict[str, float]) -> tuple[str, ...]:
    """Loss, logits, and the worst gradient with its name."""
    gradients = {n: e for n, e in errors.items() if n not in ("loss", "logits")}
    name = max(gradients, key=gradients.__getitem__)
    return f"{errors['loss']:.1e}", f"{errors['logits']:.1e}", f"{gradients[name]:.1e}", name


def picked(tokens: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens of a rank, the experts that they pick, and weights."""
    sizes, generator = sizes_of(args), torch.Generator().manual_seed(dist.get_rank())
    shape = (tokens, sizes["num_experts"])
    weights, ids = torch.rand(shape, generator=generator).topk(sizes["num_experts_per_tok"])
    x = torch.randn(tokens, sizes["hidden_size"], generator=generator).bfloat16()
    return x.to(args.device), ids.to(args.device), weights.to(args.device)


def world() -> str:
    """The name of the group of all ranks."""
    return dist.group.WORLD.group_name  # type: ignore[union-attr]


def send(
    dispatch: Any, x: Tensor, ids: Tensor, weights: Tensor, args: argparse.Namespace, *bound: Any
) -> Any:
    """A dispatch in the group of all ranks."""
    return dispatch(x, ids, weights, sizes_of(args)["num_experts"], world(), *bound)


def traffic(args: argparse.Namespace) -> str:
    """Bytes that rank 0 sends to others for a token, there and back; the least is rows alone.

    all_to_all sends ids of 8 bytes and weights of 4 beside a row, and 16 bytes of counts to each
    rank; DeepEP ids, weights and the 4 bytes of the row's number in its sender; V2 in steps of 32.
    """
    x, ids, weights = picked(args.tokens, args)
    rank, others, (tokens, width), picks = dist.get_rank(), args.ranks - 1, x.shape, ids.shape[1]
    splits = send(all_to_all_dispatch, x, ids, weights, args)[5][0].tolist()
    owners = ids // (sizes_of(args)["num_experts"] // args.ranks)
    theirs, beside = deep_ep_rows(x, ids, weights, owners, args), 12 * picks + 4
    rows = sum(splits) - splits[rank], theirs
    needed = sum(int((owners == r).any(1).sum()) for r in range(args.ranks) if r != rank)
    there_and_back = 2 * 2 * width
    sent = {
        "all_to_all": rows[0] * (there_and_back + 12 * picks) + 16 * others,
        "deepep": rows[1] * (there_and_back + (-(-beside // 32) * 32 if args.elastic else beside)),
        "least": needed * there_and_back,
    }
    return "bytes sent for a token: " + ", ".join(f"{n} {b / tokens:.0f}" for n, b in sent.items())


def deep_ep_rows(
    x: Tensor, ids: Tensor, weights: Tensor, owners: Tensor, args: argparse.Namespace
) -> int:
    """Rows that DeepEP sends to other ranks, by what its handle says."""
    rank = dist.get_rank()
    if args.elastic:
        slots = send(elastic_dispatch, x, ids, weights, args)[9]
        return int(((slots >= 0) & (owners != rank)).sum())
    is_sent = send(deep_ep_dispatch, x, ids, weights, args)[8]
    return int(is_sent.sum() - is_sent[:, rank].sum())


def check_ops(empty: int | None, args: argparse.Namespace) -> str:
    """Both dispatches, and the gradients of tokens and weights, bit for bit.

    With a bound DeepEP has more rows, the last of which are no tokens.
    """
    rank = dist.get_rank()
    x, ids, weights = picked(0 if rank == empty else args.tokens + 32 * rank, args)
    ids = torch.where(weights > 0.9, ids, -1)
    found: list[list[Tensor]] = []
    deep_ep = elastic_dispatch if args.elastic else deep_ep_dispatch
    for dispatch, bound in ((all_to_all_dispatch, ()), (deep_ep, (args.bound,))):
        inputs = [leaf.clone().requires_grad_() for leaf in (x, weights)]
        rows, local, theirs = send(dispatch, inputs[0], ids, inputs[1], args, *bound)[:3]
        cotangents = rows.detach(), torch.where(local >= 0, theirs.detach(), 0)
        count = len(found[0][0]) if found else len(rows)
        outs = (t[:count] for t in (rows.detach(), local, cotangents[1]))
        found.append([*outs, *torch.autograd.grad((rows, theirs), inputs, cotangents)])
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    every = [False] * args.ranks
    dist.all_gather_object(every, same)
    different = [rank for rank, same in enumerate(every) if not same]
    return f"DIFFERENT on ranks {different}" if different else "equal"


def waits(bound: int | None, args: argparse.Namespace) -> str:
    """Whether dispatch, experts and combine wait for the device, forward or backward.

    The stream sleeps for a second before them: if it still does when the host is through, nothing
    waited, DeepEP included, whose own waiting torch cannot see. With a bound torch watches, too:
    its error names the operator that waits.
    """
    sizes = sizes_of(args)
    x, ids, weights = picked(args.tokens, args)
    hidden, width = sizes["hidden_size"], sizes["moe_intermediate_size"]
    shapes = (2 * width, hidden), (hidden, width)
    own = sizes["num_experts"] // args.ranks
    matrices = [torch.randn(own, *shape, device=args.device).bfloat16() / 32 for shape in shapes]
    leaves = [leaf.requires_grad_() for leaf in (x, weights, *matrices)]
    layer_step(leaves, ids, bound, args)  # makes buffers, compiles kernels
    if args.tiny:
        return "not seen without a GPU"
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda._sleep(2_000_000_000)
    slept = torch.cuda.Event()
    slept.record()
    torch.cuda.set_sync_debug_mode("default" if bound is None else "error")
    try:
        grads = layer_step(leaves, ids, bound, args)
        is_asleep = not slept.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(grad.isfinite().all()) for grad in grads)
    return "no" if is_asleep else "yes"


def layer_step(
    leaves: list[Tensor], ids: Tensor, bound: int | None, args: argparse.Namespace
) -> tuple[Tensor, ...]:
    """The gradients of tokens, weights and experts, of DeepEP's ops and the experts alone."""
    x, weights, up, down = leaves
    provider, compute = DeepEPProvider(), TorchProvider().implementation(ops.experts)
    dispatch, combine = map(provider.implementation, (ops.dispatch, ops.combine))
    *arrived, places, handle = send(dispatch, x, ids, weights, args, bound)
    y = compute(*arrived, up, down, swiglu, places=places)
    out: Tensor = combine(y, handle, x.shape[0], world())
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


def swiglu(rows: Tensor) -> Tensor:
    """The experts' activation."""
    gate, up = rows.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def set_up(rank: int, args: argparse.Namespace) -> None:
    """The rank's device, and its deep_ep."""
    if args.tiny:
        torch.set_num_threads(1)
        (deep_ep_elastic_emulator if args.elastic else deep_ep_emulator).install()
        return
    torch.cuda.set_device(rank % torch.cuda.device_count())
    if args.elastic:
        vars(library()).pop("Buffer", None)  # which would go first
    else:
        library().Buffer.set_num_sms(args.sms)


def work(rank: int, store: str, args: argparse.Namespace) -> None:
    """One rank."""
    local = rank % max(torch.cuda.device_count(), 1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(args.ranks))
    set_up(rank, args)
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
    say("the unsharded model ran")
    results = [compare(model, way, want, args) for way in args.compile.split(",")]
    alone = [check_ops(None, args), check_ops(args.ranks - 1, args)]
    bytes_sent = traffic(args)
    waiting = {bound: waits(bound, args) for bound in ((None, args.bound) if args.worst else ())}
    destroy_buffers()
    if rank == 0:
        header = ("asked for", "by", "way", "loss", "logits", "worst gradient", "which")
        rows = [row for found, _, _ in results for row in found]
        print(markdown((*header, "against all_to_all"), rows))
        for line in dict.fromkeys(line for _, lines, _ in results for line in lines):
            print(line)
        print(f"ops alone: {alone[0]}; with a rank without tokens: {alone[1]}")
        print(bytes_sent)
        for bound, answer in waiting.items():
            print(f"DeepEP waits for the device, max_tokens_per_rank={bound}: {answer}")
        sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()
    is_waiting = args.worst and waiting[args.bound] == "yes"
    if is_waiting or alone != ["equal"] * 2 or not all(fine for _, _, fine in results):
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
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--worst", action="store_true")
    parser.add_argument("--limit", type=float, default=0.02)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.device = "cpu" if args.tiny else "cuda"
    args.tokens = args.tokens or (24 if args.tiny else 512)
    args.bound = args.tokens + 32 * (args.ranks - 1) if args.worst else None
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (f"{folder}/store", args), args.ranks)


if __name__ == "__main__":
    main()
