"""The peers of multi_gpu.py: each one's model, sharded over all ranks, with weights of its own.

A model is built on the meta device and sharded, and each rank then fills its own shards: matrices
are normal with a deviation of 0.02, norms are ones. A parameter's values depend on its name alone,
so that all peers with transformers' names start from the same weights.
"""

import argparse
import zlib
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from one_gpu import asked_passes, config_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

KERNELS: dict[str, dict[str, Any]] = {
    "automodel": {"attn": "te", "linear": "te", "rms_norm": "te"},
    "automodel_torch": {"attn": "sdpa", "linear": "torch", "rms_norm": "torch"},
    "automodel_fake": {"attn": "te", "linear": "te", "rms_norm": "te"},
}
MESH = {"mesh_dim_names": ("ep",)}


def shape_of(args: argparse.Namespace) -> Qwen3MoeConfig:
    """The model's configuration: one_gpu.py's, or tiny widths and a small vocabulary."""
    config = config_of(args.layers)
    if args.tiny:
        from deepep_one_gpu import TINY, VOCABULARY

        config.update(TINY | {"vocab_size": VOCABULARY})
    return config


def with_shared_expert(config: Qwen3MoeConfig, width: int) -> Qwen2MoeConfig:
    """A model of the same widths whose layers have a shared expert, too."""
    names = "vocab_size hidden_size moe_intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads num_experts num_experts_per_tok norm_topk_prob use_cache"
    sizes = {name: getattr(config, name) for name in names.split()}
    return Qwen2MoeConfig(shared_expert_intermediate_size=width, qkv_bias=False, **sizes)


def build(peer: str, args: argparse.Namespace, **options: Any) -> nn.Module:
    """The model as a peer trains it; `options` are those of `OptimizeConfig`."""
    if peer.startswith("automodel"):
        model = automodel(peer, shape_of(args), args)
        fill(model, dist.get_rank())
        return model
    model = on_meta(args)
    if peer.startswith("moe"):
        model = moe(peer, model, args, options)
    else:
        shard(peer, model, args)
    materialize(model, args)
    return model


def on_meta(args: argparse.Namespace) -> PreTrainedModel:
    """Transformers' model without weights."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        kinds = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
        config: PreTrainedConfig = shape_of(args)
        kind: type[PreTrainedModel] = Qwen3MoeForCausalLM
        if args.shared:
            config, kind = with_shared_expert(shape_of(args), args.shared), Qwen2MoeForCausalLM
        model = kind._from_config(config, **kinds).train()
    torch.set_default_dtype(torch.float32)
    return model


def shard(peer: str, model: PreTrainedModel, args: argparse.Namespace) -> None:
    """FSDP2 over all ranks, a unit for each layer and one for the rest.

    Only what is inside of FSDP2's hooks is compiled, each layer as one graph.
    """
    mesh = init_device_mesh(args.device, (args.ranks,))
    for layer in model.model.layers:
        if peer == "hf_compile":
            layer.forward = torch.compile(layer.forward, backend=args.backend)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def moe(
    peer: str, model: PreTrainedModel, args: argparse.Namespace, options: dict[str, Any]
) -> PreTrainedModel:
    """moe_compile's, with all ranks sharing out the experts."""
    import moe_compile

    dispatcher: Any = "all_to_all" if peer.startswith("moe_all_to_all") else "deepep"
    options = {"compile": {"backend": args.backend}, **options_of(peer, args)} | options
    config = moe_compile.OptimizeConfig(dispatcher=dispatcher, **options)
    mesh = init_device_mesh(args.device, (args.ranks,), **MESH)
    model = moe_compile.optimize(model, mesh, config, passes=passes_of(peer, args))
    report = moe_compile.report(model)
    if dist.get_rank() == 0:
        print(report, flush=True)
    if list(report.dispatchers) != [dispatcher]:
        raise RuntimeError(f"tokens do not travel by {dispatcher}: {report.dispatchers}")
    return model


def options_of(peer: str, args: argparse.Namespace) -> dict[str, Any]:
    """The options that a peer's name asks for."""
    found: dict[str, Any] = {"max_tokens_per_rank": args.bound if "bound" in peer else None}
    if "selective" in peer:
        found["activation_checkpointing"] = "selective"
    if "gathered" in peer:
        found["fsdp"] = {"reshard_after_forward": False}
    if "joined" in peer:
        found["layers_per_unit"] = 4
    return found


def passes_of(peer: str, args: argparse.Namespace) -> Any:
    """The order of passes that a peer's name asks for."""
    from moe_compile import PIPELINE
    from moe_compile.passes import ChunkTokens, LimitPicks, OverlapSharedExperts

    share = args.bound * shape_of(args).num_experts_per_tok
    asked = asked_passes() | {
        "chunks": ChunkTokens(2),
        "limited": LimitPicks(2 * share),
        "shared": OverlapSharedExperts(),
    }
    return PIPELINE.after("dispatch_experts", *(step for n, step in asked.items() if n in peer))


def automodel(peer: str, config: Qwen3MoeConfig, args: argparse.Namespace) -> nn.Module:
    """NeMo AutoModel's port; its auxiliary loss, which no other peer has, is off.

    Kernels are those of its own benchmark recipe of this model: TransformerEngine's, and grouped
    products by torch. Its DeepEP path permutes with TransformerEngine, whatever else is chosen.
    """
    from nemo_automodel import NeMoAutoModelForCausalLM
    from nemo_automodel.components.distributed import DistributedSetup, ParallelismSizes
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.moe.megatron.fused_a2a import HAVE_DEEP_EP
    from nemo_automodel.components.moe.megatron.moe_utils import HAS_TE

    config.router_aux_loss_coef = 0.0
    dispatcher = "deepep" if HAVE_DEEP_EP and HAS_TE else "torch"
    if peer != "automodel_torch" and dispatcher == "torch":
        raise RuntimeError(f"{peer} needs DeepEP ({HAVE_DEEP_EP}), TransformerEngine ({HAS_TE})")
    kernels = {"experts": "torch_mm", "dispatcher": dispatcher} | KERNELS[peer]
    backend = BackendConfig(fake_balanced_gate=peer == "automodel_fake", **kernels)
    if dist.get_rank() == 0:
        print(peer, backend, flush=True)
    setup = DistributedSetup.build("fsdp2", ParallelismSizes(ep_size=args.ranks))
    args.moe_mesh = setup.mesh_context.moe_mesh
    return NeMoAutoModelForCausalLM.from_config(
        config, torch_dtype=torch.bfloat16, backend=backend, distributed_setup=setup
    ).train()


def materialize(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """Gives a transformers model on the meta device memory, weights, and its rotary buffers."""
    model.to_empty(device=args.device)
    fill(model)
    rotary: nn.Module = model.model.rotary_emb
    fresh = type(rotary)(config=model.config, device=torch.device(args.device))
    for name, buffer in fresh.named_buffers():
        rotary.get_buffer(name).copy_(buffer)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, left
    assert {n for n, _ in model.named_buffers()} <= {
        f"model.rotary_emb.{n}" for n, _ in fresh.named_buffers()
    }


@torch.no_grad()
def fill(model: nn.Module, rank: int = 0) -> None:
    """Fills every parameter; plain ones, which are a rank's own experts, differ from rank to rank.

    A parameter is made whole, on the device, and each rank keeps its shard of it.
    """
    for name, parameter in model.named_parameters():
        is_shard = isinstance(parameter, DTensor)
        local = parameter.to_local() if is_shard else parameter
        whole = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
        generator = torch.Generator(local.device)
        generator.manual_seed(zlib.crc32(name.encode()) + (0 if is_shard else rank))
        whole.normal_(0, 0.02, generator=generator) if whole.dim() > 1 else whole.fill_(1)
        local.copy_(own(whole, parameter) if is_shard else whole)


def own(whole: Tensor, like: DTensor) -> Tensor:
    """What this rank keeps of a tensor that every rank has."""
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()


def finish_gradients(peer: str, model: Any, args: argparse.Namespace) -> None:
    """AutoModel's recipes divide the experts' gradients after the backward; others need nothing."""
    if not peer.startswith("automodel"):
        return
    from nemo_automodel.components.training.utils import scale_grads_and_clip_grad_norm

    options = {"moe_mesh": args.moe_mesh, "ep_axis_name": "ep", "dp_group_size": args.ranks}
    scale_grads_and_clip_grad_norm(None, [model], **options)


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Fused AdamW; a fused step takes no plain tensors beside sharded ones, hence the groups."""
    groups = defaultdict[Any, list[nn.Parameter]](list)
    for parameter in model.parameters():
        groups[getattr(parameter, "device_mesh", None)].append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], rate, fused=True)
