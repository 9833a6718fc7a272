"""What experts by Triton take, and what they refuse."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_compile.ops import experts, rms_norm
from moe_compile.providers.provider import Lacks
from moe_compile.providers.triton import TritonProvider
from tests.providers.test_optional import W, X, block, fake, norm

TRITON = TritonProvider()


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says of a GPU with an H100's memory."""
    found = SimpleNamespace(shared_memory_per_multiprocessor=233472)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    weights = {"up": fake(4, 36, 32, dtype=dtype), "down": fake(4, 24, 18, dtype=dtype)}
    assert TRITON.supports(experts, block(**weights)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe": "current"}, "not of FP8: these are"),
        ({"norm": torch.relu}, "a norm comes first here"),
        ({"weigh_input": True}, "they are weighed first here"),
        ({"up": fake(4, 32, 32, dtype=torch.float32)}, "float16: up is torch.float32"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    assert str(TRITON.supports(experts, block(**changes))).endswith(reason)


def test_devices(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of desktops have too little memory beside their multiprocessors."""
    gpu.shared_memory_per_multiprocessor = 102400
    refusal = TRITON.supports(experts, block())
    assert str(refusal).endswith("take 163840 bytes of a multiprocessor's memory: got 102400")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs the package triton" in str(TRITON.supports(experts, block()))
    on_cpu = block(x=fake(3, 32, device="cpu"))
    assert isinstance(TRITON.supports(experts, on_cpu), Lacks)
    assert isinstance(TRITON.supports(rms_norm, norm(X, W)), Lacks)
