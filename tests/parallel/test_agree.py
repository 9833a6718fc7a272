"""What ranks compare before they act."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import init_device_mesh

from moe_compile.optimize import graph_lines
from moe_compile.parallel import agree
from moe_compile.parallel.agree import check_agreement, meet, on_every_rank
from moe_compile.parallel.layout import Layout, _take_timeout, layout_of
from tests.ranks import on_ranks


def lines(device: str, group: str) -> list[str]:
    graph = fx.Graph()
    node = graph.call_function(torch.arange, (3,), {"device": torch.device(device)})
    anything: Any = object()
    graph.output(graph.call_function(print, (node, group, anything)))
    return graph_lines(graph, torch.device(device), group)


def test_graphs_of_ranks_with_other_devices_and_groups_are_the_same() -> None:
    assert lines("cuda:0", "5") == lines("cuda:1", "6")
    assert "device: cuda" in "".join(lines("cuda:1", "5"))


def layout() -> Layout:
    found = layout_of(init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    assert found is not None
    return found


def compare() -> None:
    check_agreement(["x"], layout())
    other = ["x", "y" * 10_000] if dist.get_rank() else ["x"]
    with pytest.raises(ValueError, match=r"rank 0 has '\(nothing\)', rank 1 has 'yyy"):
        check_agreement(other, layout())


def fail() -> None:
    def act() -> int:
        return 1 // (1 - dist.get_rank())

    expected: Any = (ZeroDivisionError, RuntimeError)[1 - dist.get_rank()]
    with pytest.raises(expected, match="division") as caught:
        on_every_rank("a test", act, 2)
    if dist.get_rank() == 0:
        assert "a test failed on rank 1" in str(caught.value)


def fail_while_others_compare() -> None:
    here = layout()

    def act() -> None:
        if dist.get_rank() == 1:
            raise ZeroDivisionError
        check_agreement(["x"], here)

    expected: Any = (RuntimeError, ZeroDivisionError)[dist.get_rank()]
    with pytest.raises(expected) as caught:
        on_every_rank("a test", act, 2)
    if dist.get_rank() == 0:
        assert "a test failed on rank 1: ZeroDivisionError" in str(caught.value)


def compare_alone() -> None:
    here = layout()

    def act() -> None:
        if dist.get_rank() == 0:
            check_agreement(["x"], here)

    with pytest.raises(RuntimeError, match="rank 0 is comparing, rank 1 is done"):
        on_every_rank("a test", act, 2)


def wait() -> None:
    agree.PATIENCE = timedelta(seconds=1)
    here = layout()
    if dist.get_rank() == 1:
        with pytest.raises(RuntimeError, match=r"rank 1, and in 1 seconds none from rank 0"):
            meet("a test", here.group)
    dist.barrier()
    meet("a test", here.group)  # what failed is forgotten


def timeouts() -> None:
    """A group of ours waits as long as the job's, not as long as torch's default."""
    group: Any = dist.new_group([0, 1])
    world: Any = dist.group.WORLD
    cpu = torch.device("cpu")
    expected = world._get_backend(cpu).options._timeout
    assert group._get_backend(cpu).options._timeout != expected
    _take_timeout(group, cpu)
    assert group._get_backend(cpu).options._timeout == expected


def together() -> None:
    timeouts()
    compare()
    fail()
    fail_while_others_compare()
    compare_alone()
    wait()


def test_ranks_that_differ_fail_or_do_not_come() -> None:
    on_ranks(2, together)
