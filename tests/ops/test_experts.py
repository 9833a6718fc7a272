from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_compile.ops import experts

EAGER: Any = {"experts_implementation": "eager"}


def routing(tokens: int, num_experts: int, picks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weights, ids = torch.randn(tokens, num_experts).softmax(-1).topk(picks)
    return ids, weights.to(dtype).requires_grad_()


def assert_same(module: torch.nn.Module, op: Any, dtype: torch.dtype, exact: bool) -> None:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    module.to(dtype)
    x = torch.randn(9, 16).to(dtype).requires_grad_()
    ids, weights = routing(9, 6, 2, dtype)
    leaves = (x, weights, *module.parameters())
    want, got = module(x, ids, weights), op(x, ids, weights)
    grad = torch.randn_like(want)
    results = zip(
        [got, *torch.autograd.grad(got, leaves, grad)],
        [want, *torch.autograd.grad(want, leaves, grad)],
        strict=True,
    )
    for a, b in results:
        assert a.dtype == b.dtype
        assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qwen(dtype: torch.dtype) -> None:
    module: Any = Qwen3MoeExperts(
        Qwen3MoeConfig(num_experts=6, hidden_size=16, moe_intermediate_size=8, **EAGER)
    )

    def gated(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    def op(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts(x, ids, weights, module.gate_up_proj, module.down_proj, gated)

    assert_same(module, op, dtype, exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt_oss(dtype: torch.dtype) -> None:
    module: Any = GptOssExperts(
        GptOssConfig(num_local_experts=6, hidden_size=16, intermediate_size=8, **EAGER)
    )

    def op(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts(
            x,
            ids,
            weights,
            module.gate_up_proj,
            module.down_proj,
            module._apply_gate,
            module.gate_up_proj_bias,
            module.down_proj_bias,
            transposed=True,
        )

    assert_same(module, op, dtype, exact=True)


def test_nemotron_h() -> None:
    module: Any = NemotronHExperts(
        NemotronHConfig(
            n_routed_experts=6,
            hidden_size=16,
            moe_intermediate_size=8,
            **EAGER,
        )
    )

    def op(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts(x, ids, weights, module.up_proj, module.down_proj, module.act_fn)

    assert_same(module, op, torch.float32, exact=False)


def leaves(tokens: int, num_experts: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = [(tokens, 4), (tokens, 2), (num_experts, 6, 4), (num_experts, 5, 6)]
    x, weights, up, down = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    return x, weights, up, down


def test_one_pick_at_a_time() -> None:
    x, weights, up, down = leaves(5)
    ids = torch.tensor([[0, 2], [2, 0], [-1, 2], [-1, -1], [0, 0]])
    want = torch.zeros(5, 5, dtype=torch.float64)
    for t, k in (ids >= 0).nonzero().tolist():
        e = ids[t, k]
        want[t] += weights[t, k] * (down[e] @ torch.tanh(up[e] @ x[t]))
    torch.testing.assert_close(experts(x, ids, weights, up, down, torch.tanh), want)


def test_weigh_input() -> None:
    x, weights, up, down = leaves(2)
    ids = torch.tensor([[0, 1], [2, -1]])
    got = experts(x, ids, weights, up, down, torch.tanh, weigh_input=True)
    want = torch.zeros(2, 5, dtype=torch.float64)
    for t, k, e in ((0, 0, 0), (0, 1, 1), (1, 0, 2)):
        want[t] += down[e] @ torch.tanh(up[e] @ (x[t] * weights[t, k]))
    torch.testing.assert_close(got, want)


def test_gradients_of_what_is_not_used_are_zero_not_none() -> None:
    x, weights, up, down = leaves(3)
    ids = torch.tensor([[0, -1], [0, 2], [-1, -1]])
    out = experts(x, ids, weights, up, down, torch.tanh)
    grads = torch.autograd.grad(out.square().sum(), (x, weights, up, down))
    assert grads[0][2].eq(0).all()
    assert grads[1][ids < 0].eq(0).all()
    assert grads[2][1].eq(0).all()
    assert grads[3][1].eq(0).all()


def test_no_tokens() -> None:
    x, weights, up, down = leaves(0)
    out = experts(x, torch.zeros(0, 2, dtype=torch.int64), weights, up, down, torch.tanh)
    assert out.shape == (0, 5)
    grads = torch.autograd.grad(out.sum(), (x, weights, up, down))
    assert all(g.eq(0).all() for g in grads)


def test_gradcheck() -> None:
    x, weights, up, down = leaves(3)
    ids = torch.tensor([[0, -1], [0, 2], [2, 2]])
    bias = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def op(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        return experts(x, ids, weights, up, down, torch.tanh, bias)

    assert torch.autograd.gradcheck(op, (x, weights, up, down, bias), fast_mode=True)
