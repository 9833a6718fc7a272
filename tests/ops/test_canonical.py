import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, fx

from moe_compile.ops import OPS, canonical, rms_norm


def test_every_op_is_listed_under_its_name() -> None:
    names = {"attention", "combine", "dispatch", "experts", "gated_mlp", "rms_norm", "rotary"}
    assert names <= set(OPS)
    assert all(op.name == name == op.__name__ for name, op in OPS.items())
    assert repr(rms_norm) == "<canonical op rms_norm>"


def test_an_op_is_its_reference_with_the_same_signature() -> None:
    x = torch.randn(3)
    assert torch.equal(rms_norm(x, None, 1e-6), rms_norm.reference(x, None, 1e-6))
    assert inspect.signature(rms_norm) == inspect.signature(rms_norm.reference)


def test_copies_are_the_same_op() -> None:
    assert copy.deepcopy(rms_norm) is rms_norm
    assert pickle.loads(pickle.dumps(rms_norm)) is rms_norm
    assert len({rms_norm, rms_norm}) == 1


def test_a_second_op_of_a_name_is_refused() -> None:
    def rms_norm(x: Tensor) -> Tensor:
        return x

    with pytest.raises(AssertionError, match="two canonical ops are called rms_norm"):
        canonical(rms_norm)


def test_an_op_is_the_target_of_a_node_and_the_graph_runs() -> None:
    graph = fx.Graph()
    node = graph.call_function(rms_norm, (graph.placeholder("x"), None, 1e-6))
    graph.output(node)
    module = copy.deepcopy(fx.GraphModule(torch.nn.Module(), graph))
    assert [n.target for n in module.graph.nodes if n.op == "call_function"] == [rms_norm]
    x = torch.randn(3)
    assert torch.equal(module(x), rms_norm(x, None, 1e-6))
