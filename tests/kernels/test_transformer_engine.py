"""TransformerEngine's norm, on its own kernels where they are and on plain torch elsewhere."""

import importlib.util
from typing import Any

import pytest
import torch

from moe_compile.kernels import transformer_engine
from moe_compile.kernels.transformer_engine import te_rms_norm
from moe_compile.ops import rms_norm
from moe_compile.providers.transformer_engine import TransformerEngineProvider
from tests.kernels import emulators
from tests.providers.test_torch import assert_close, leaf

HERE = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not HERE, reason="needs a GPU and transformer_engine"),
        ],
    ),
]
NORM = TransformerEngineProvider().implementation(rms_norm)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The default device; on the CPU TransformerEngine is emulated."""
    torch.manual_seed(0)
    if request.param == "cpu":
        names = {dtype: str(dtype) for dtype in (torch.bfloat16, torch.float32)}
        monkeypatch.setattr(transformer_engine, "library", lambda: emulators.TRANSFORMER_ENGINE)
        monkeypatch.setattr(transformer_engine, "_dtypes", lambda: names)
    with torch.device(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"cast_first": True}, {"offset": 1.0}])
@pytest.mark.parametrize("shape", [(3, 5, 32), (4000, 64), (0, 32)])
@pytest.mark.usefixtures("device")
def test_norm(shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_close(rms_norm, dtype, leaf(*shape), leaf(shape[-1]), 1e-5, fn=NORM, **options)


@pytest.mark.usefixtures("device")
def test_norm_of_a_tensor_that_is_not_contiguous() -> None:
    x = leaf(3, 32, 5).transpose(1, 2).detach().requires_grad_()
    assert_close(rms_norm, torch.bfloat16, x, leaf(32), 1e-5, fn=NORM)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiles_for_any_number_of_rows(device: str) -> None:
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    fn = torch.compile(NORM, fullgraph=True, backend=backend, dynamic=True)
    for rows in (5, 33, 8):
        assert_close(rms_norm, torch.float32, leaf(2, rows, 32), leaf(32), 1e-5, fn=fn)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("device")
def test_the_operator_is_sound() -> None:
    torch.library.opcheck(te_rms_norm, (leaf(3, 4, 8), leaf(8), 1e-5, False))
