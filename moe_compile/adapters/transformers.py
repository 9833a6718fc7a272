"""Everything that moe_compile knows of transformers beyond plain `nn.Module`s.

Public names used: `PreTrainedModel`, `AttentionInterface`, the `experts_implementation` and
`use_cache` settings, the `gradient_checkpointing` flag. Private names used, each with what happens
where it is missing:

* `PreTrainedConfig._experts_implementation`: experts that can be traced; without it a shadow runs
  those that the model does.
* `PreTrainedConfig._attn_implementation`: the attention's name, which a `GraphedStep` changes, and
  a shadow whose attention cannot be traced; without it there are none of either.
* `utils.output_capturing._active_collector`: recording router logits inside compiled layers;
  without it Dynamo cannot trace the recording hooks, and `output_router_logits=True` needs
  `compile=False`.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn

HANDED_THROUGH = (
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "use_cache",
)
"""Keywords of a model's forward that reach its layers, which seldom look at them."""


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is a transformers model, or a PEFT model around one."""
    from transformers import PreTrainedModel

    return any(isinstance(module, PreTrainedModel) for module in _outer(model))


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model itself, below a PEFT wrapper."""
    from transformers import PreTrainedModel

    return next(module for module in _outer(model) if isinstance(module, PreTrainedModel))


def _outer(model: nn.Module) -> Iterator[nn.Module]:
    """`model` and what a PEFT wrapper keeps at `base_model.model`."""
    yield model
    inner = getattr(model, "base_model", None)
    # FSDP2 makes a subclass of a model's class.
    kinds = type(model).__mro__
    if inner is not None and any(kind.__module__.startswith("peft") for kind in kinds):
        yield getattr(inner, "model", inner)


def make_traceable(shadow: nn.Module) -> None:
    """Chooses traceable experts and no checkpointing on a shadow; the results are the same.

    Attention by another library's kernels, and masks that are no tensors, cannot be traced: there
    is a function in its place, as which it is refused, and no mask.
    """
    for module in shadow.modules():
        if getattr(module, "gradient_checkpointing", False):
            vars(module)["gradient_checkpointing"] = False
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "grouped_mm"
    kinds = [(c, c._attn_implementation) for c in _configs(shadow)]
    for config, kind in kinds:
        wanted = kind if kind in (None, "eager", "sdpa", _UNMASKED) else _foreign_attention(kind)
        if config._attn_implementation != wanted:  # setting it sets those of inner configs, too
            config._attn_implementation = wanted


def _configs(model: nn.Module) -> list[Any]:
    """Each config in the model that has a kind of attention, outer ones first."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())


@functools.cache
def _foreign_attention(kind: str) -> str:
    """The name of an attention that stands for `kind`, in a graph that nothing is cut out of."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(ctx: Any, run: Callable[..., Any], *tensors: Tensor) -> Tensor:
        return run(*tensors)[0]

    label = re.sub(r"\W", "_", kind)
    function = type(label, (torch.autograd.Function,), {"forward": staticmethod(forward)})

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        known = {name: options[name] for name in ("scaling", "dropout") if name in options}
        sdpa = functools.partial(ALL_ATTENTION_FUNCTIONS["sdpa"], attention_mask=None, **known)
        return function.apply(functools.partial(sdpa, module), query, key, value), None

    name = f"moe_compile_stands_for_{label}"
    AttentionInterface.register(name, attention)
    return name


def probe_inputs(
    model: nn.Module, batch: torch.SymInt, sequence: torch.SymInt, device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls that may be legal for the model, as keyword arguments of its forward, and in words.

    Token ids alone, with a mask, or as embeddings with positions; no cache. Of a model for images,
    one image.
    """
    base = base_model(model)
    config: Any = base.config
    if getattr(base, "main_input_name", "input_ids") == "pixel_values":
        yield "a call with an image", {"pixel_values": _image(config, batch, device)}
        return
    ids = torch.zeros(batch, sequence, dtype=torch.int64, device=device)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    yield "a call with text alone", inputs
    mask = torch.ones_like(ids)
    yield "a call with text alone", inputs | {"attention_mask": mask}
    width = config.get_text_config(decoder=True).hidden_size
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
    states = torch.zeros(batch, sequence, width, dtype=dtype, device=device)
    places = mask.cumsum(-1) - 1
    given = {"inputs_embeds": states, "attention_mask": mask, "position_ids": places}
    yield "a call with embeddings", given | {"use_cache": False}


def _image(config: Any, batch: torch.SymInt, device: torch.device) -> torch.Tensor:
    """One image of the model's size in every row."""
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return torch.zeros(batch, channels, height, width, device=device)


def head(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The module that gives a language model's logits, and its name; None where none is known."""
    base: Any = base_model(model) if is_pretrained(model) else None
    own = None if base is None else base.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(own), ""), own


def token_embedding(model: nn.Module) -> nn.Embedding | None:
    """The table of a language model's tokens; None where none is known, or it is no plain one."""
    if not is_pretrained(model):
        return None
    base: Any = base_model(model)
    try:
        own = base.get_input_embeddings()
    except NotImplementedError:  # what has no tokens, as a model of images
        return None
    return own if type(own) is nn.Embedding else None


def attention_kind(model: nn.Module) -> str | None:
    """The name of the model's attention among transformers'; None for another kind of model."""
    config: Any = base_model(model).config if is_pretrained(model) else None
    return getattr(config, "_attn_implementation", None)


@contextlib.contextmanager
def without_masks(model: nn.Module) -> Generator[None]:
    """Lets a model with the attention `sdpa` make no masks, as for rows of which it needs none.

    To see that it needs none, transformers reads a result on the host, and while a CUDA graph is
    captured it makes them all. It makes none for an attention of a name that it has no masks for.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionInterface.register(_UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])
    named = [c for c in _configs(model) if c._attn_implementation == "sdpa"]
    for config in named:
        config._attn_implementation = _UNMASKED
    try:
        yield
    finally:
        for config in named:
            config._attn_implementation = "sdpa"


_UNMASKED = "moe_compile_sdpa_without_masks"


def quantisation(model: nn.Module) -> str | None:
    """The name of the model's quantisation method, or None."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(method)


@contextlib.contextmanager
def recording_inside() -> Generator[None]:
    """Lets transformers' output hooks record from inside a compiled layer.

    The hooks append to a collector that is held in a context variable, which Dynamo cannot read,
    and whose lists grow from layer to layer, which would recompile every layer. So the layer is
    given a collector of its own with empty lists, as a plain global, and what it recorded is
    moved over. The hooks stay when nothing is recorded any more: then they find None there.
    """
    collector = _collector()
    if collector is None:
        yield
        return
    outer = collector.context_var.get()
    inner: dict[str, Any] | None = None
    if outer:
        inner = {key: [] for key in outer if not key.startswith("_")}
    collector.global_var, collector.compiling = inner, True
    try:
        yield
    finally:
        collector.global_var, collector.compiling = None, False
    for key, values in (inner or {}).items():
        outer[key].extend(values)


def _collector() -> Any:
    with contextlib.suppress(ImportError, AttributeError):
        from transformers.utils import output_capturing

        collector = output_capturing._active_collector
        return collector if hasattr(collector, "context_var") else None
    return None
