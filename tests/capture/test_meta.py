import torch
from torch import nn
from transformers import AutoModelForCausalLM

import moe_compile
from tests.families import FAMILIES, build
from tests.pairs import check_close, inputs, step


def test_a_meta_model_is_optimized_before_it_has_weights() -> None:
    original = build("mixtral", torch.float32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["mixtral"](), dtype=torch.float32)
    optimized = moe_compile.optimize(model.train())
    assert all(parameter.is_meta for parameter in optimized.parameters())
    kinds = {s.kind for s in moe_compile.report(optimized).sites if s.status == "rewritten"}
    assert kinds >= {"experts", "attention", "rms_norm"}
    _materialise(optimized, original)
    check_close(step(optimized, **inputs()), step(original, **inputs()))


def _materialise(model: nn.Module, source: nn.Module) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    for name, buffer in source.named_buffers():
        model.get_buffer(name).copy_(buffer)
