import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel

import moe_compile
from moe_compile import PIPELINE, OptimizeConfig
from moe_compile.checks import check_mesh
from tests.families import build

PLACES = [moe_compile.optimize, moe_compile.explain]
places = pytest.mark.parametrize("place", PLACES)


@dataclass(frozen=True)
class Mesh:
    """As much of a DeviceMesh as is looked at before any process group is made."""

    mesh_dim_names: tuple[str, ...] | None
    shape: tuple[int, ...]
    device_type: str = "cpu"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> int:
        return math.prod(self.shape) if dim is None else self.shape[dim]


@pytest.fixture
def model() -> PreTrainedModel:
    return build("mixtral", torch.bfloat16, num_hidden_layers=1)


def check(error: pytest.ExceptionInfo[ValueError], *parts: str) -> None:
    """The message says what was got, what is taken, and what to do."""
    message = str(error.value)
    for part in ("got ", "it takes ", *parts):
        assert part in message
    assert len(message.split("; ")) >= 3, f"nothing says what to do: {message}"


WRONG_VALUES: list[tuple[str, Any]] = [
    ("compile", "yes"),
    ("compile", 1),
    ("fsdp", "zero3"),
    ("dispatcher", "nccl"),
    ("activation_checkpointing", True),
    ("loss", "liger"),
    ("verify", True),
    ("verify", "on"),
    ("deterministic", 1),
    ("deterministic", "auto"),
    ("layers_per_unit", 0),
    ("layers_per_unit", None),
    ("max_tokens_per_rank", 0),
    ("max_tokens_per_rank", -1),
    ("max_tokens_per_rank", True),
    ("max_tokens_per_rank", 8.0),
    ("providers", "torch"),
    ("providers", {"rms_normal": "torch"}),
    ("providers", {"rms_norm": "tensorflow"}),
]


@pytest.mark.parametrize(("field", "value"), WRONG_VALUES, ids=str)
def test_a_wrong_config_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^OptimizeConfig\.{field} got ") as error:
        OptimizeConfig(**{field: value})
    offending = next(iter(value.items())) if isinstance(value, dict) else (value,)
    check(error, *(["rms_normal"] if "rms_normal" in offending else [repr(offending[-1])]))


def test_an_unknown_config_field() -> None:
    with pytest.raises(TypeError, match="colour"):
        OptimizeConfig(colour="red")  # type: ignore[call-arg]


UNREADY: list[tuple[str, Any]] = [
    ("fsdp", True),
    ("fsdp", {"reshard_after_forward": True}),
    ("layers_per_unit", 2),
    ("dispatcher", "deepep"),
    ("dispatcher", "all_to_all"),
    ("max_tokens_per_rank", 8),
]


@places
@pytest.mark.parametrize(("field", "value"), UNREADY, ids=str)
def test_an_option_of_a_later_release(
    place: Any, field: str, value: Any, model: PreTrainedModel
) -> None:
    with pytest.raises(ValueError, match=rf"^OptimizeConfig\.{field} got ") as error:
        place(model, config=OptimizeConfig(**{field: value}))
    check(error, repr(value), "this release")


@places
@pytest.mark.parametrize("warn_only", [None, True])
def test_determinism_that_torch_was_not_asked_for(
    place: Any, warn_only: bool | None, model: PreTrainedModel
) -> None:
    torch.use_deterministic_algorithms(warn_only is not None, warn_only=bool(warn_only))
    try:
        with pytest.raises(ValueError, match=r"^OptimizeConfig\.deterministic got True") as error:
            place(model, config=OptimizeConfig(deterministic=True))
    finally:
        torch.use_deterministic_algorithms(False)
    check(error, "torch.use_deterministic_algorithms(True)")


@places
@pytest.mark.parametrize(
    ("field", "value"), [("measure", True), ("compile", {"mode": "max-autotune"})]
)
def test_choices_by_a_clock_beside_determinism(
    place: Any, field: str, value: Any, model: PreTrainedModel
) -> None:
    asked: dict[str, Any] = {"deterministic": True, field: value}
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match=rf"^OptimizeConfig\.{field} got ") as error:
            place(model, config=OptimizeConfig(**asked))
    finally:
        torch.use_deterministic_algorithms(False)
    check(error, "timing")


POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


@places
@pytest.mark.parametrize(
    ("options", "part"),
    [({"mesh": None}, "'mesh'"), ({"mp_policy": POLICY}, "bfloat16"), ({"ignored_params": []}, "")],
)
def test_options_of_fsdp(place: Any, options: Any, part: str, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"^OptimizeConfig\.fsdp got ") as error:
        place(model, config=OptimizeConfig(fsdp=options))
    check(error, part)


@places
def test_not_a_module(place: Any) -> None:
    with pytest.raises(ValueError, match="got a str") as error:
        place("mixtral")
    check(error, "nn.Module", "from_pretrained")


@places
def test_quantised_by_its_config(place: Any) -> None:
    model = build("mixtral", torch.bfloat16, num_hidden_layers=1)
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="quantised with fp8") as error:
        place(model)
    check(error, "bfloat16", "dequantise")


@places
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_parameters(place: Any, dtype: torch.dtype) -> None:
    model = build("mixtral", torch.bfloat16, num_hidden_layers=1)
    projection = model.get_submodule("model.layers.0.self_attn.q_proj")
    weight = torch.zeros(32, 32, dtype=dtype)
    projection.weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"quantised with {dtype}") as error:
        place(model)
    check(error, "dequantise")


@places
def test_example_inputs_missing(place: Any) -> None:
    with pytest.raises(ValueError, match="got a Linear") as error:
        place(nn.Linear(4, 4))
    check(error, "no example_inputs", "example_inputs=(tensor, ...)")


@places
@pytest.mark.parametrize("given", [torch.ones(2, 4), [torch.ones(2, 4)]])
def test_example_inputs_that_are_no_tuple_or_dict(place: Any, given: Any) -> None:
    with pytest.raises(ValueError, match=r"^example_inputs got a ") as error:
        place(nn.Linear(4, 4), example_inputs=given)
    check(error, type(given).__name__, "a tuple of positional or a dict of keyword", "(tensor,)")


@places
@pytest.mark.parametrize("given", [(), {}, {"x": 1}])
def test_example_inputs_without_a_tensor(place: Any, given: Any) -> None:
    with pytest.raises(ValueError, match=r"^example_inputs got ") as error:
        place(nn.Linear(4, 4), example_inputs=given)
    check(error, "tensor")


@places
@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        (Mesh(("ep", "tp"), (2, 1)), ("'tp'", "dp_replicate, dp_shard, ep", "rename")),
        (Mesh(None, (2, 2)), ("(2, 2)", "no names", "mesh_dim_names")),
    ],
)
def test_a_wrong_mesh(place: Any, mesh: Any, parts: tuple[str, ...], model: Any) -> None:
    with pytest.raises(ValueError, match=r"^the mesh got ") as error:
        place(model, mesh)
    check(error, *parts)


@places
def test_a_model_on_several_devices(place: Any) -> None:
    model = build("mixtral", torch.bfloat16, num_hidden_layers=1)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="got parameters on cpu, meta and a mesh of cpu") as error:
        place(model, Mesh(("ep",), (2,)))
    check(error, "model.to")


@places
def test_a_model_on_another_kind_of_device(place: Any) -> None:
    model = build("mixtral", torch.bfloat16, num_hidden_layers=1)
    mode = FakeTensorMode()
    model = copy.deepcopy(model, {id(p): cuda(p, mode) for p in model.parameters()})
    with pytest.raises(ValueError, match="got parameters on cuda and a mesh of cpu") as error:
        place(model, Mesh(("ep",), (2,)))
    check(error, "all on cpu", "the meta device", "model.to")


def cuda(parameter: nn.Parameter, mode: FakeTensorMode) -> nn.Parameter:
    """A parameter on CUDA, as far as anyone can see."""
    meta = torch.empty_like(parameter, device="meta")
    return nn.Parameter(FakeTensor(mode, meta, torch.device("cuda")))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_that_can_be_moved(device: str, model: Any) -> None:
    mesh: Any = Mesh(("ep",), (2,), device_type="cuda")
    check_mesh(mesh, model.to(device))


@pytest.mark.parametrize(
    "edit",
    [
        lambda: PIPELINE.without("raise_normals"),
        lambda: PIPELINE.before("raise_normals", PIPELINE["normalize"]),
        lambda: PIPELINE.after("raise_normals", PIPELINE["normalize"]),
        lambda: PIPELINE.replace("raise_normals", PIPELINE["normalize"]),
        lambda: PIPELINE["raise_normals"],
    ],
)
def test_an_unknown_pass(edit: Any) -> None:
    with pytest.raises(ValueError, match="got 'raise_normals'") as error:
        edit()
    message = str(error.value)
    assert all(name in message for name in PIPELINE.names())


@places
@pytest.mark.parametrize("passes", ["normalize", ["normalize"], tuple(PIPELINE)])
def test_passes_that_are_no_pipeline(place: Any, passes: Any, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="passes got a ") as error:
        place(model, passes=passes)
    check(error, "Pipeline")


@places
def test_a_config_that_is_no_config(place: Any, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="config got a dict") as error:
        place(model, config={"compile": False})
    check(error, "OptimizeConfig")


def test_the_report_of_a_model_that_was_not_optimized(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="was not optimized") as error:
        moe_compile.report(model)
    check(error, type(model).__name__, "explain(model)")


@places
def test_optimized_already(place: Any) -> None:
    model = moe_compile.optimize(
        nn.Sequential(nn.RMSNorm(4)), example_inputs=(torch.ones(2, 3, 4),)
    )
    with pytest.raises(ValueError, match="optimized already") as error:
        place(model, example_inputs=(torch.ones(2, 3, 4),))
    check(error, "Sequential", "load it again")
