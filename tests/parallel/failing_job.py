"""A job for torchrun, whose rank 1 comes to an end in its second step.

python -m torch.distributed.run --nproc-per-node 2 tests/parallel/failing_job.py WAY PLACE FOLDER
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

import moe_compile
from moe_compile import OptimizeConfig
from tests.families import build
from tests.pairs import inputs
from tests.parallel.models import EXPERTS_ONLY

TIMEOUT = 10


def main(way: str, place: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    config = OptimizeConfig(verify="off")
    model = moe_compile.optimize(build("mixtral"), mesh, config, passes=EXPERTS_ONLY)
    dist.barrier()
    _set_pg_timeout(timedelta(seconds=TIMEOUT))  # not before: ranks begin at different times
    for number in range(2):
        if (rank, number) == (1, 1):
            end_in(model.get_submodule("model.layers.1"), way, place, folder)
        model(**inputs(seed=rank)).loss.backward()


def end_in(layer: torch.nn.Module, way: str, place: str, folder: Path) -> None:
    """Ends the rank in the layer, forward or backward."""

    def end(*_: Any) -> None:
        (folder / "time").write_text(str(time.time()))
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "raise":
            raise ZeroDivisionError("in the middle of a step")
        time.sleep(1000)

    if place == "forward":
        layer.register_forward_pre_hook(end)
    else:
        layer.register_forward_hook(lambda *call: call[-1].register_hook(end) and None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
