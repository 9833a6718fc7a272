"""What a user can get wrong, each as a `ValueError` that says got, takes and what to do."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from moe_compile.adapters import transformers as hf
from moe_compile.config import OptimizeConfig
from moe_compile.parallel.layout import NAMES, dimension_names
from moe_compile.rewrite.pipeline import Pipeline

_STORAGE_ONLY = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}


def check_model(model: Any, example_inputs: Any, *, optimized: bool) -> None:
    """The model is a module, whole, not yet optimized, and callable without guessing."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"optimize got a {type(model).__name__}; it takes an nn.Module; load the model first, "
            "for example with AutoModelForCausalLM.from_pretrained"
        )
    if optimized:
        raise ValueError(
            f"optimize got a {type(model).__name__} that is optimized already; it takes a model as "
            "it was loaded; load it again to optimize it in another way"
        )
    _check_quantisation(model)
    if example_inputs is None and not hf.is_pretrained(model):
        raise ValueError(
            f"optimize got a {type(model).__name__}, which is no transformers model, and no "
            "example_inputs; it takes them to learn how the layers are called; pass "
            "example_inputs=(tensor, ...), a tuple of positional or a dict of keyword arguments"
        )
    if example_inputs is not None:
        _check_example_inputs(example_inputs)


def _check_example_inputs(example_inputs: Any) -> None:
    if not isinstance(example_inputs, (tuple, dict)):
        raise ValueError(
            f"example_inputs got a {type(example_inputs).__name__}; it takes a tuple of positional "
            "or a dict of keyword arguments of the model; write (tensor,) for a single one"
        )
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example_inputs)):
        raise ValueError(
            f"example_inputs got {example_inputs!r}; it takes a tuple of positional or a dict of "
            "keyword arguments with a tensor whose first dimension is the batch; pass the inputs "
            "of one forward of the model"
        )


def _check_quantisation(model: nn.Module) -> None:
    method = hf.quantisation(model)
    stored = next((p.dtype for p in model.parameters() if p.dtype in _STORAGE_ONLY), None)
    if method is not None or stored is not None:
        raise ValueError(
            f"optimize got weights quantised with {method or stored}; it takes bfloat16, float16 "
            "or float32 weights; load the model without quantisation, or dequantise it first"
        )


def check_mesh(mesh: DeviceMesh | None, model: nn.Module) -> None:
    """Known names, and a model that is where the mesh is, or that can be moved there."""
    if mesh is None:
        return
    unknown = [n for n in dimension_names(mesh) if n not in NAMES]
    if unknown:
        raise ValueError(
            f"the mesh got the dimension {unknown[0]!r}; it takes {', '.join(NAMES)}; "
            "rename it in init_device_mesh"
        )
    devices = {parameter.device.type for parameter in model.parameters()}
    wrong = devices - {mesh.device_type, "cpu", "meta"}
    if wrong or len(devices) > 1:
        raise ValueError(
            f"the model got parameters on {', '.join(sorted(devices))} and a mesh of "
            f"{mesh.device_type}; it takes a model that is all on {mesh.device_type}, on the CPU "
            "or on the meta device; move it with model.to"
        )


def check_passes(passes: Any) -> None:
    """An order of passes is a `Pipeline`, which has checked it."""
    if not isinstance(passes, Pipeline):
        raise ValueError(
            f"passes got a {type(passes).__name__}; it takes a Pipeline; edit moe_compile.PIPELINE "
            "with its without, before, after and replace"
        )


def check_config(config: Any, mesh: DeviceMesh | None) -> None:
    """Options whose work does not exist yet are errors, not silence."""
    if not isinstance(config, OptimizeConfig):
        raise ValueError(
            f"config got a {type(config).__name__}; it takes an OptimizeConfig; write "
            "OptimizeConfig(compile=False), for example"
        )
    _check_fsdp(config.fsdp)
    _check_deterministic(config)
    alone = mesh is None or mesh.size() == 1
    unready = {
        "fsdp": (alone and config.fsdp not in ("auto", False), "pass a mesh with it"),
        "layers_per_unit": (
            (alone or config.fsdp is False) and config.layers_per_unit != 1,
            "pass a mesh, and not fsdp=False",
        ),
        "dispatcher": (alone and config.dispatcher != "auto", "pass a mesh with it"),
        "max_tokens_per_rank": (
            alone and config.max_tokens_per_rank is not None,
            "pass a mesh with it",
        ),
    }
    for name, (asked, instead) in unready.items():
        if asked:
            raise ValueError(
                f"OptimizeConfig.{name} got {getattr(config, name)!r}, which this release does not "
                f"have; it takes {OptimizeConfig.__dataclass_fields__[name].default!r}; {instead}"
            )


def _check_deterministic(config: OptimizeConfig) -> None:
    """Torch's own kernels are the user's to set; nothing may be chosen by a clock."""
    if not config.deterministic:
        return
    strict = torch.are_deterministic_algorithms_enabled()
    if not strict or torch.is_deterministic_algorithms_warn_only_enabled():
        raise ValueError(
            "OptimizeConfig.deterministic got True while torch may add in any order, as in the "
            "gradients of attention and of embeddings; it takes torch's strict setting; call "
            "torch.use_deterministic_algorithms(True) first, and leave it on while you train"
        )
    if config.measure is True:
        raise ValueError(
            "OptimizeConfig.measure got True beside deterministic=True; it takes False or 'auto': "
            "a timing may choose another provider in the next run; leave it out"
        )
    if isinstance(config.compile, Mapping) and "mode" in config.compile:
        raise ValueError(
            f"OptimizeConfig.compile got the mode {config.compile['mode']!r} beside "
            "deterministic=True; it takes options: a mode may choose kernels by a timing; leave "
            "the mode out"
        )


def _check_fsdp(options: Any) -> None:
    """What optimize decides itself, and a dtype that the captures do not hold for."""
    if not isinstance(options, Mapping):
        return
    ours = sorted({"mesh", "ignored_params"} & options.keys())
    if ours:
        raise ValueError(
            f"OptimizeConfig.fsdp got {ours[0]!r}; it takes the other options of fully_shard; "
            "leave it out: the mesh says it"
        )
    dtype = getattr(options.get("mp_policy"), "param_dtype", None)
    if dtype is not None:
        raise ValueError(
            f"OptimizeConfig.fsdp got a mixed-precision policy that computes in {dtype}; it takes "
            "one without param_dtype; run the model under torch.autocast, or load it in that dtype"
        )
