import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

from moe_compile.ops import gated_mlp


def test_bit_exact_with_transformers() -> None:
    module = Qwen3MoeMLP(Qwen3MoeConfig(hidden_size=16), intermediate_size=24).bfloat16()
    x = torch.randn(2, 5, 16).bfloat16()
    gate, up, down = (p.weight for p in (module.gate_proj, module.up_proj, module.down_proj))
    assert torch.equal(gated_mlp(x, gate, up, down, torch.nn.functional.silu), module(x))


def test_biases() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    gate, up, down = (torch.randn(s, dtype=torch.float64) for s in ((6, 4), (6, 4), (4, 6)))
    bias = [torch.randn(n, dtype=torch.float64) for n in (6, 6, 4)]
    want = ((x @ gate.T + bias[0]).tanh() * (x @ up.T + bias[1])) @ down.T + bias[2]
    torch.testing.assert_close(gated_mlp(x, gate, up, down, torch.tanh, *bias), want)
