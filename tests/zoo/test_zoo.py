import pytest
import torch
from torch import nn

from tests.zoo.entries import (
    LOOK_ALIKES,
    Entry,
    build,
    config_of,
    entries,
    entry_of,
    moe_types,
    types_of,
)
from tests.zoo.inputs import call_of, loss_of

SAMPLE = {"mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "qwen3_vl_moe", "nllb-moe"}
RUNNING = [entry for entry in entries() if not entry.broken]
BROKEN = [entry for entry in entries() if entry.broken]


def parameters(chosen: list[Entry]) -> list[object]:
    """Every family; `make test` runs a sample."""
    return [
        pytest.param(entry, id=entry.name, marks=() if entry.name in SAMPLE else pytest.mark.matrix)
        for entry in chosen
    ]


running = pytest.mark.parametrize("entry", parameters(RUNNING))


def stepped(entry: Entry, seed: int = 0) -> tuple[float, nn.Module]:
    """The loss of one training step, and the model with its gradients."""
    model = build(entry, seed=seed)
    loss = loss_of(model(**call_of(entry)))
    loss.backward()
    return loss.item(), model


@running
def test_trains(entry: Entry) -> None:
    loss, model = stepped(entry)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    finite = [name for name, gradient in gradients.items() if gradient.isfinite().all()]
    assert torch.tensor(loss).isfinite()
    assert len(finite) == len(gradients)
    assert any(gradients[name].any() for name in gradients if "expert" in name)
    assert loss_of(model(**call_of(entry))) == loss, "the model is not deterministic"


@running
def test_no_parameter_or_bias_hides_a_mistake(entry: Entry) -> None:
    model = build(entry)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.numel() > 1:
            assert tensor.any(), name
    for name, parameter in model.named_parameters():
        assert not (parameter == 1).all(), name


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen4_exp", marks=pytest.mark.matrix)])
def test_a_seed_makes_one_model(name: str) -> None:
    (loss, model), (again, other) = (stepped(entry_of(name)) for _ in range(2))
    assert loss == again
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    assert stepped(entry_of(name), seed=1)[0] != loss


@pytest.mark.parametrize("entry", BROKEN, ids=lambda entry: entry.name)
def test_what_is_broken_still_is(entry: Entry) -> None:
    model = build(entry)
    with pytest.raises(TypeError, match=entry.broken):
        model(**call_of(entry))


@pytest.mark.slow
def test_no_family_is_missing() -> None:
    covered = {entry.model_type for entry in entries()}.union(
        *(types_of(config_of(entry)) for entry in entries())
    )
    assert moe_types() - covered - LOOK_ALIKES == set()
    assert not LOOK_ALIKES & covered
