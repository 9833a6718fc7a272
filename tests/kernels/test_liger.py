"""Liger's ops, on its own kernels where they are and on plain torch elsewhere."""

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moe_compile.kernels import liger
from moe_compile.kernels.liger import liger_rms_norm, liger_swiglu
from moe_compile.ops import gated_mlp, rms_norm
from moe_compile.providers.liger import LigerProvider
from tests.kernels import emulators
from tests.providers.test_torch import assert_close, leaf

HERE = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not HERE, reason="needs a GPU and liger-kernel"),
        ],
    ),
]
PROVIDER = LigerProvider()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The default device; on the CPU Liger is emulated."""
    torch.manual_seed(0)
    if request.param == "cpu":
        monkeypatch.setattr(liger, "library", emulators.liger)
    with torch.device(request.param):
        yield request.param


DTYPES = [torch.float32, torch.bfloat16]
NORMS = [{}, {"cast_first": True}, {"offset": 1.0}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize("shape", [(3, 5, 32), (40000, 64), (0, 32)])
@pytest.mark.usefixtures("device")
def test_norm(shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> None:
    fn = PROVIDER.implementation(rms_norm)
    assert_close(rms_norm, dtype, leaf(*shape), leaf(shape[-1]), 1e-5, fn=fn, **options)


@pytest.mark.parametrize("cast_first", [False, True])
@pytest.mark.usefixtures("device")
def test_norm_without_weight_of_a_tensor_that_is_not_contiguous(cast_first: bool) -> None:
    x = leaf(3, 32, 5).transpose(1, 2).detach().requires_grad_()
    fn = PROVIDER.implementation(rms_norm)
    assert_close(rms_norm, torch.bfloat16, x, None, 1e-5, fn=fn, cast_first=cast_first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("device")
def test_gated_mlp(bias: bool, dtype: torch.dtype) -> None:
    biases = [leaf(24), leaf(24), leaf(16)] if bias else []
    args = (leaf(2, 5, 16), leaf(24, 16), leaf(24, 16), leaf(16, 24), F.silu, *biases)
    assert_close(gated_mlp, dtype, *args, fn=PROVIDER.implementation(gated_mlp))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("op", [rms_norm, gated_mlp])
def test_compiles_for_any_number_of_rows(op: Any, device: str) -> None:
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    fn = torch.compile(PROVIDER.implementation(op), fullgraph=True, backend=backend, dynamic=True)
    for rows in (5, 33, 8):
        args = (leaf(32), 1e-5)
        if op is gated_mlp:
            args = (leaf(24, 32), leaf(24, 32), leaf(32, 24), F.silu)
        assert_close(op, torch.float32, leaf(2, rows, 32), *args, fn=fn)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("device")
def test_the_operators_are_sound() -> None:
    torch.library.opcheck(liger_rms_norm, (leaf(3, 4, 8), leaf(8), 1e-5, 0.0, False))
    torch.library.opcheck(liger_rms_norm, (leaf(3, 8), None, 1e-5, 0.0, True))
    torch.library.opcheck(liger_swiglu, (leaf(3, 4, 8), leaf(3, 4, 8)))
