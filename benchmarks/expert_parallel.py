"""Expert parallelism on the CPU, over gloo: bytes that travel, memory of a rank, time of a step.

python benchmarks/expert_parallel.py                   # 1, 2 and 4 ranks
python benchmarks/expert_parallel.py --ranks 2 --layers 1

Each number of ranks is a run of its own, with one thread a rank; all ranks share this machine's
cores, so the times say what compilation and communication cost, not how it scales. The loss of
every run is printed beside them: the same rows are spread over the ranks.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import describe, markdown
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import moe_compile

HIDDEN, EXPERTS, PICKS = 512, 32, 4
ROWS, LENGTH = 4, 128


def build(layers: int) -> PreTrainedModel:
    """A model most of whose parameters are experts, the same on every rank."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        moe_intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=PICKS,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


class Traffic:
    """Counts the bytes that `all_to_all_single` sends to other ranks."""

    def __init__(self) -> None:
        self.bytes = 0
        self._send = dist.all_to_all_single

    def __enter__(self) -> "Traffic":
        dist.all_to_all_single = self._count
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single = self._send

    def _count(
        self, out: Tensor, x: Tensor, received: Any = None, sent: Any = None, group: Any = None
    ) -> Any:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        sizes = sent if sent is not None else [x.shape[0] // ranks] * ranks
        away = sum(size for other, size in enumerate(sizes) if other != rank)
        self.bytes += away * x[:1].numel() * x.element_size() if len(x) else 0
        return self._send(out, x, received, sent, group=group)


def work(rank: int, ranks: int, folder: str, args: argparse.Namespace, results: Any) -> None:
    """One rank: eager and compiled steps, and what they took."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    ids = torch.randint(1024, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mine = ids.chunk(ranks)[rank]
    found: dict[str, Any] = {}
    for name, compile in (("eager", False), ("compiled", {"backend": args.backend})):
        config = moe_compile.OptimizeConfig(compile=compile)
        model = moe_compile.optimize(build(args.layers), mesh, config)
        found[name], found["loss"] = milliseconds(model, mine, args.repeat)
    found |= memory(model) | traffic(model, mine, args.layers)
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def milliseconds(model: PreTrainedModel, ids: Tensor, repeat: int) -> tuple[float, float]:
    """The median time of a forward and backward, and the mean loss of all ranks."""
    times: list[float] = []
    for _ in range(repeat + 2):
        model.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        times.append(time.perf_counter() - start)
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return statistics.median(times[2:]) * 1e3, mean.item()


def memory(model: PreTrainedModel) -> dict[str, float]:
    """MiB of this rank: expert parameters, all parameters, and the process at its largest."""

    def mib(parameters: Any) -> float:
        local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
        return sum(p.numel() * p.element_size() for p in local) / 2**20

    experts = [p for p in model.parameters() if p.dim() == 3]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"experts": mib(experts), "parameters": mib(model.parameters()), "peak": peak}


def traffic(model: PreTrainedModel, ids: Tensor, layers: int) -> dict[str, float]:
    """Bytes that a rank sends a token and layer, in the forward, and the least that would do.

    The least is one row for each (token, other rank) that owns one of its experts, there and back,
    from the experts' ids alone.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    needed = torch.zeros(ranks, ranks, dtype=torch.int64)

    def count(_: Any, given: tuple[Tensor, ...]) -> None:
        needed[rank] += owners(given[1])

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(count)
    with Traffic() as sent, torch.no_grad():
        model(input_ids=ids)
    dist.all_reduce(needed)
    away = needed.fill_diagonal_(0)
    rows = int(away[rank].sum() + away[:, rank].sum())
    tokens = ids.numel() * layers
    return {"bytes": sent.bytes / tokens, "least": rows * HIDDEN * 4 / tokens}


def owners(ids: Tensor) -> Tensor:
    """For each rank, how many tokens have one of its experts or more; ids are [T, K]."""
    ranks = dist.get_world_size()
    found = [rank for picks in ids.tolist() for rank in {e * ranks // EXPERTS for e in picks}]
    return torch.bincount(torch.tensor(found), minlength=ranks)


def run(ranks: int, args: argparse.Namespace) -> tuple[str, ...]:
    """The table's line for a number of ranks; the memory is the largest of any rank's."""
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        spawned = mp.spawn(work, (ranks, folder, args, results), ranks, join=False)
        found = dict(results.get() for _ in range(ranks))
        spawned.join()
    worst = {name: max(each[name] for each in found.values()) for name in found[0]}
    return (
        str(ranks),
        f"{worst['experts']:.1f} MiB",
        f"{worst['parameters']:.1f} MiB",
        f"{worst['peak']:.0f} MiB",
        f"{worst['bytes']:.0f}",
        f"{worst['least']:.0f}",
        f"{worst['eager']:.0f} ms",
        f"{worst['compiled']:.0f} ms",
        f"{worst['loss']:.5f}",
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--backend", default="inductor")
    args = parser.parse_args()
    print(describe())
    header = ("ranks", "experts", "parameters", "peak", "bytes sent", "least", "eager", "compiled")
    print(markdown((*header, "loss"), [run(ranks, args) for ranks in args.ranks]))


if __name__ == "__main__":
    main()
