from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from moe_compile.kernels.activation import activate, is_fusable
from moe_compile.kernels.expert_rows import collect_rows, group_picks, spread_rows
from tests.kernels.test_activation import key_of, swiglu

EXPERTS, PICKS, WIDTH = 4, 2, 32
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def block() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """All of the operators around the experts' products."""
    key = key_of(swiglu, WIDTH)
    assert is_fusable(key, WIDTH)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        grouped = group_picks(ids, EXPERTS)
        rows = spread_rows(x, *grouped, PICKS)
        weight = weights.reshape(-1, 1).index_select(0, grouped[0])
        rows = activate(rows, weight, grouped[2], key)
        return collect_rows(rows, *grouped, PICKS)

    return run


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(EXPERTS, (tokens, PICKS), device="cuda")
    weights = torch.rand(tokens, PICKS, device="cuda", requires_grad=True)
    return x, ids, weights


def both(run: Callable[..., Tensor], x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    out = run(x, ids, weights)
    return [out, *torch.autograd.grad(out.float().square().sum(), (x, weights))]


@pytest.mark.gpu
@gpu
def test_a_compiled_graph_starts_the_kernels_itself() -> None:
    run = block()
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    example = inputs(40)
    got, code = run_and_get_code(both, compiled, *example)
    assert len(code) == 2
    assert not any("moe_compile." in text for text in code), "an operator is still called"
    torch.testing.assert_close(got, both(run, *example))
    for tokens in (3, 257):
        example = inputs(tokens)
        torch.testing.assert_close(both(compiled, *example), both(run, *example))


@pytest.mark.gpu
@gpu
def test_rows_whose_number_depends_on_data_may_be_none() -> None:
    run = block()

    @torch.compile(fullgraph=True)
    def some(keep: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = keep.nonzero()[:, 0]
        return run(x[rows], ids[rows], weights[rows])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for kept in (40, 7, 0):
            x, ids, weights = inputs(40)
            keep = torch.arange(40, device="cuda") < kept
            got = some(keep, x, ids, weights)
            torch.testing.assert_close(got, run(x[:kept], ids[:kept], weights[:kept]))
            got.sum().backward()
            assert x.grad is not None
            assert x.grad[kept:].count_nonzero() == 0
