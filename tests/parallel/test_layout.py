"""What a mesh may look like."""

from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import moe_compile
from moe_compile.parallel.layout import Layout, layout_of
from tests.parallel.models import EXPERTS_ONLY, check_step, small
from tests.ranks import on_ranks


def sizes(layout: Layout | None) -> dict[str, int]:
    assert layout is not None
    return layout.sizes


def without_names() -> None:
    alone = {"dp_replicate": 1, "dp_shard": 1, "ep": 4}
    for ranks in ([0, 1, 2, 3], [[0, 1, 2, 3]], [[[0]], [[1]], [[2]], [[3]]]):
        assert sizes(layout_of(DeviceMesh("cpu", ranks))) == alone


def in_another_order() -> None:
    """Neighbours on the last dimension share out the experts, or the shards of each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "dp_shard"))
    layout = layout_of(mesh)
    assert sizes(layout) == {"dp_replicate": 1, "dp_shard": 2, "ep": 2}
    assert layout is not None
    assert layout.experts is not None
    assert layout.experts.mesh.tolist() == mesh.mesh.tolist()
    check_on(mesh, "all_to_all, torch")


def check_on(mesh: DeviceMesh, provider: str) -> None:
    model: Any = moe_compile.optimize(small(), mesh, passes=EXPERTS_ONLY)
    (site,) = [s for s in moe_compile.report(model).sites if s.kind == "experts"]
    assert site.provider == provider
    check_step(model, small())


def on_four_ranks() -> None:
    without_names()
    in_another_order()
    # No token travels where every rank has all experts.
    check_on(init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp_shard", "ep")), "torch")


def test_meshes_without_names_in_any_order_and_with_an_ep_of_one() -> None:
    on_ranks(4, on_four_ranks)
