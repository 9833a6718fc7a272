"""The options of `optimize`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from moe_compile.ops import OPS

_CHOICES: dict[str, tuple[Any, ...]] = {
    "compile": ("auto", True, False),
    "fsdp": ("auto", True, False),
    "layers_per_unit": (),
    "dispatcher": ("auto", "deepep", "all_to_all"),
    "max_tokens_per_rank": (None,),
    "measure": ("auto", True, False),
    "activation_checkpointing": ("none", "selective", "full"),
    "loss": ("auto", "fused", "model"),
    "verify": ("auto", "off", "raise", "full"),
    "autocast": (True, False),
    "deterministic": (True, False),
}


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def is_count(value: Any) -> bool:
    """Whether a value is a positive int."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "compile": (_is_mapping, "a dict of torch.compile options"),
    "fsdp": (_is_mapping, "a dict of fully_shard options"),
    "layers_per_unit": (is_count, "a positive int"),
    "max_tokens_per_rank": (is_count, "a positive int"),
}
"""What a field takes beside its choices."""

CONFIG = "_moe_compile_config"
"""The attribute of an optimized model that holds its config."""


@dataclass(frozen=True, kw_only=True)
class OptimizeConfig:
    """What `optimize` should do. Every default is the right choice for training.

    Attributes:
        compile: hand each layer to `torch.compile(fullgraph=True)`: `"auto"` is on for CUDA and off
            for the CPU; a dict is passed on as options.
        fsdp: shard all but the experts with FSDP2, which also averages their gradients over the
            ranks: `"auto"` is on when the mesh has more than one. With False both are left to you.
        layers_per_unit: how many layers, one after the other, are one unit of FSDP2. Every unit has
            hooks and collectives of its own, whose time on the CPU small layers cannot hide; all of
            a unit but its experts is whole on a rank while one of its layers computes. More than
            one takes a model that always calls all of its layers.
        dispatcher: how tokens travel between expert-parallel ranks: `"auto"` is DeepEP where it is
            installed and takes the model, else all_to_all, and so is `"deepep"`; the report says
            which of them, and why it could not be DeepEP.
        max_tokens_per_rank: promises that no rank brings more tokens to a layer in one call,
            padding included. DeepEP then does not wait for the device, and has this many rows for
            every rank; and a large token embedding, which all ranks must then call equally often,
            keeps its rows on their ranks. A call that breaks the promise is a `ValueError`.
        providers: `"auto"`, the fastest; or canonical op name -> the provider that must implement
            it.
        measure: time the providers of an op where several take a call, and choose the fastest;
            without it the first of them in a fixed order. `"auto"` is on for CUDA, where it takes
            seconds, and off for the CPU. Timings are kept in `~/.cache/moe_compile/timings.json`,
            or in the folder that the environment variable MOE_COMPILE_CACHE names.
        activation_checkpointing: what the backward of a layer computes again: `"none"` nothing;
            `"selective"` what is cheap (norms, activations, casts), no product and no attention;
            `"full"` everything. Neither routes again: top-k, the order of the picks and what was
            dispatched are kept. A call with a key-value cache keeps everything.
        loss: `"fused"`: in training the logits are computed when something reads them, and never
            where only their cross-entropy is; a model that this cannot be done to is a
            `ValueError`. `"model"`: as the model does. `"auto"`: fused where it can be.
        autocast: prepare the layers for calls under autocast to bfloat16, too. With False such
            calls run the model's own code, and `optimize` takes about 0.6 of the time.
        verify: check every rewrite against the original on small inputs; what fails is refused.
            `"auto"` does so except for meta tensors and layers of more than 256 MiB; `"full"` for
            large layers too, proves the algebra over a prime field, and checks the passes' facts;
            `"raise"` does the same for the raised graph only, before providers are chosen.
        deterministic: two runs give the same bits. Takes `torch.use_deterministic_algorithms(True)`
            as set, which is yours to set; then chooses only implementations that add in one order,
            and none by a timing.

    Raises:
        ValueError: for a value that the field does not take.
    """

    compile: bool | Literal["auto"] | Mapping[str, Any] = "auto"
    fsdp: bool | Literal["auto"] | Mapping[str, Any] = "auto"
    layers_per_unit: int = 1
    dispatcher: Literal["auto", "deepep", "all_to_all"] = "auto"
    max_tokens_per_rank: int | None = None
    providers: Literal["auto"] | Mapping[str, str] = "auto"
    measure: bool | Literal["auto"] = "auto"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    loss: Literal["auto", "fused", "model"] = "auto"
    verify: Literal["auto", "off", "raise", "full"] = "auto"
    autocast: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "providers":
                _check_providers(value)
            elif not _accepts(field.name, value):
                choices = ", ".join(map(repr, _CHOICES[field.name]))
                takes = " or ".join(filter(None, (choices, _KINDS.get(field.name, (0, ""))[1])))
                raise ValueError(
                    f"OptimizeConfig.{field.name} got {value!r}; it takes {takes}; "
                    f"leave it out for {field.default!r}"
                )

    def wanted_providers(self) -> dict[str, str]:
        """Canonical op name -> the provider that must implement it, where one is asked for."""
        wanted = {} if self.providers == "auto" else dict(self.providers)
        return wanted if self.dispatcher == "auto" else {"dispatch": self.dispatcher} | wanted


def _accepts(name: str, value: Any) -> bool:
    if name in _KINDS and _KINDS[name][0](value):
        return True
    return any(
        value is choice or (isinstance(value, str) and value == choice) for choice in _CHOICES[name]
    )


def _check_providers(value: Any) -> None:
    if value == "auto":
        return
    if not isinstance(value, Mapping):
        raise ValueError(
            f"OptimizeConfig.providers got {value!r}; it takes 'auto' or a dict from op to "
            "provider, such as {'rms_norm': 'torch'}; leave it out for 'auto'"
        )
    from moe_compile.providers.registry import PROVIDERS

    known = [provider.name for provider in PROVIDERS]
    for op, provider in value.items():
        if op not in OPS:
            raise ValueError(
                f"OptimizeConfig.providers got the op {op!r}; it takes "
                f"{', '.join(sorted(OPS))}; leave an op out to have its provider chosen"
            )
        if provider not in known:
            raise ValueError(
                f"OptimizeConfig.providers got the provider {provider!r} for {op!r}; "
                f"it takes {', '.join(known)}; leave the op out to have its provider chosen"
            )
