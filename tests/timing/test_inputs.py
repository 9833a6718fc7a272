import pytest
import sympy
import torch

from moe_compile.capture.shadow import cast_shadow
from moe_compile.ops import attention, experts, rms_norm
from moe_compile.providers import Call
from moe_compile.rewrite.refuse import Refuse
from moe_compile.timing.inputs import Form, Sizes, describe, forms_of, make

CPU = torch.device("cpu")


def test_symbolic_sizes_get_their_numbers() -> None:
    shadow = cast_shadow(torch.nn.Linear(2, 2))
    sizes = Sizes.of(shadow.batch, shadow.sequence, (3, 5))
    with shadow.mode:
        x = torch.empty(shadow.batch * shadow.sequence, 4)
        assert shadow.mode.shape_env is not None
        routed = torch.empty(shadow.mode.shape_env.create_unbacked_symint() * 2, 4)
    forms = forms_of(experts, Call((x, routed, None, None, None, None)), sizes)
    assert forms["x"] == Form(torch.float32, (15, 4), (4, 1))
    assert forms["ids"].shape == (30, 4)


def test_another_unknown_size_is_refused() -> None:
    shadow = cast_shadow(torch.nn.Linear(2, 2))
    with shadow.mode:
        x = torch.empty(shadow.batch * shadow.sequence, 4)
    sizes = Sizes({shadow.batch.node.expr: sympy.Integer(3)}, 1)
    with pytest.raises(Refuse, match=r"nobody knows a number for the size .* of an argument"):
        forms_of(rms_norm, Call((x, None, 1e-6)), sizes)


def test_tensors_are_those_of_the_forms() -> None:
    """Strides too; picks are experts; masks and ids want no gradient."""
    query = torch.empty(2, 5, 4, 8, dtype=torch.bfloat16).transpose(1, 2)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    call = Call((query, query, query, mask, None), {"scale": 0.5})
    made = make(forms_of(attention, call, Sizes({}, 1)), CPU)
    assert made["query"].stride() == query.stride()
    assert made["query"].dtype == torch.bfloat16
    assert made["query"].requires_grad
    assert torch.equal(made["mask"], mask.tril())
    assert made["scale"] == 0.5
    ids, weights = torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, 2)
    up, down = torch.ones(4, 6, 3), torch.ones(4, 3, 3)
    forms = forms_of(experts, Call((torch.ones(6, 3), ids, weights, up, down, abs)), Sizes({}, 1))
    made = make(forms, CPU)
    assert set(made["ids"].unique().tolist()) <= {0, 1, 2, 3}
    assert [name for name, t in made.items() if getattr(t, "requires_grad", False)] == [
        "x",
        "weights",
        "up",
        "down",
    ]


def test_the_description_leaves_out_what_is_not_given() -> None:
    x = torch.empty(5, 2, 8).transpose(0, 1)
    forms = forms_of(rms_norm, Call((x, None, 1e-6)), Sizes({}, 1))
    assert describe(forms) == (
        "x float32[2, 5, 8] by [8, 16, 1], eps 1e-06, cast_first False, offset 0.0"
    )


def test_a_form_knows_its_bytes() -> None:
    assert Form(torch.bfloat16, (2, 3), (3, 1)).bytes == 12
    assert Form(torch.float32, (4, 3), (0, 1)).bytes == 12
    assert Form(torch.float32, (0, 3), (3, 1)).bytes == 0
