import pytest
import torch
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

from moe_compile.ops import normed_rotary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_model_does_with_its_queries(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = qwen.Qwen3MoeRMSNorm(8, 1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 3, 8).to(dtype).requires_grad_()
    angle = torch.randn(2, 5, 8)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    heads = norm(x).transpose(1, 2)
    want, _ = qwen.apply_rotary_pos_emb(heads, heads, cos, sin)
    angles = cos[:, None], sin[:, None]
    got = normed_rotary(x.transpose(1, 2), norm.weight, *angles, 1e-6, cast_first=True)
    assert torch.equal(got, want)
    grad = torch.randn_like(want)
    found, wanted = (torch.autograd.grad(y, (x, norm.weight), grad) for y in (got, want))
    torch.testing.assert_close(found, wanted)  # the weight's is summed in another order
