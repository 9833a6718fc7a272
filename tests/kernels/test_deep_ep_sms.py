import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from moe_compile.kernels import deep_ep_sms
from moe_compile.kernels.deep_ep_sms import configs, num_sms
from tests import deep_ep_emulator
from tests.deep_ep_emulator import Buffer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "deep_ep", deep_ep_emulator)
    ranks(monkeypatch, 4)
    yield
    Buffer.set_num_sms(20)


def ranks(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """4 ranks share out the experts, of so many."""
    four = SimpleNamespace(size=lambda: 4)
    monkeypatch.setattr(deep_ep_sms, "process_group", lambda _: four)
    monkeypatch.setattr(deep_ep_sms.dist, "get_world_size", lambda: every)


def test_alone_kernels_take_more_than_the_library_gives() -> None:
    assert num_sms(CPU, "") == 96 > Buffer.num_sms


def test_what_somebody_set_stays() -> None:
    Buffer.set_num_sms(24)
    assert num_sms(CPU, "") == 24


@pytest.mark.parametrize(
    ("there", "every", "taken"),
    [(132, 4, 96), (132, 8, 68), (148, 8, 84), (114, 4, 82), (78, 8, 20)],
)
def test_others_that_wait_have_room(
    there: int, every: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(monkeypatch, every)
    monkeypatch.setattr(deep_ep_sms, "_multiprocessors", lambda _: there)
    assert num_sms(CPU, "") == taken


def test_configurations() -> None:
    assert configs(64, 4)[0].num_sms == configs(64, 4)[1].num_sms == 64
    assert configs(20, 4) == (Buffer.get_dispatch_config(4), Buffer.get_combine_config(4))
    Buffer.set_num_sms(64)
    assert configs(64, 2) == (Buffer.get_dispatch_config(2), Buffer.get_combine_config(2))
