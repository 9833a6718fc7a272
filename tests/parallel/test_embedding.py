"""A token embedding whose rows stay on their ranks."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from transformers import PretrainedConfig, PreTrainedModel

from moe_compile import OptimizeConfig
from moe_compile.adapters.transformers import token_embedding
from moe_compile.parallel.embedding import should_stay
from moe_compile.parallel.layout import layout_of
from tests.parallel.models import both, call_of, check_gradients, check_step, small, with_forward
from tests.ranks import on_ranks

BOUND = OptimizeConfig(max_tokens_per_rank=40, compile=False)


def stays(model: Any) -> bool:
    """Whether FSDP2 has nothing to do with the embedding's table."""
    embedding = model.get_input_embeddings()
    managed = model._get_fsdp_state()._fsdp_param_group.fsdp_params
    return all(p._module_info.module is not embedding for p in managed)


def steps() -> None:
    """Ranks with other numbers of ids, with a bound and none, and a table that does not divide."""
    for config, wanted in ((BOUND, True), (OptimizeConfig(compile=False), False)):
        model, reference = both("ep", small(vocab_size=131), config)
        assert stays(model) is wanted
        table = model.get_input_embeddings().weight
        assert table.placements == (Shard(0),)
        assert table.shape == (131, table.shape[1])
        check_step(model, reference)


def extended() -> None:
    """A table that somebody has put a larger one in the place of, whose `num_embeddings` is old."""
    start = small(vocab_size=131)
    embedding = start.get_input_embeddings()
    more = torch.randn(13, embedding.weight.shape[1])
    embedding.weight = nn.Parameter(torch.cat([embedding.weight.detach(), more]))
    model, reference = both("ep", start, BOUND)
    assert stays(model)
    check_step(model, reference)


def calls() -> None:
    """Of every number of calls that a backward may be of."""
    model, reference = both("ep", small(), BOUND)
    check_gradients(model, reference, of_logits)
    check_gradients(model, reference, of_two_forwards)
    check_gradients(model, reference, of_two_lookups)
    check_gradients(model, reference, of_the_weight)
    check_gradients(model, reference, of_rows_that_are_written)


def of_logits(model: Any, rank: int) -> torch.Tensor:
    return model(**call_of(rank)).logits.float().log_softmax(-1)[..., 3].mean()


def of_two_forwards(model: Any, rank: int) -> torch.Tensor:
    return of_logits(model, rank) + of_logits(model, rank + 1)


def of_two_lookups(model: Any, rank: int) -> torch.Tensor:
    """The second one of other ids, and of one whose rows are not trained."""

    def forward(self: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        embed = self.get_input_embeddings()
        rows = embed(input_ids) + embed(input_ids.flip(-1)) + embed(input_ids[:, :1]).detach()
        hidden = self.model(inputs_embeds=rows, use_cache=False).last_hidden_state
        return self.lm_head(hidden).float().log_softmax(-1)[..., 3].mean()

    return with_forward(model, forward, rank)


def of_the_weight(model: Any, rank: int) -> torch.Tensor:
    """A penalty beside the loss."""
    penalty = model.get_input_embeddings().weight.square().sum()
    penalty = getattr(penalty, "full_tensor", lambda: penalty)()
    return of_logits(model, rank) + 0.1 * penalty


def of_rows_that_are_written(model: Any, rank: int) -> torch.Tensor:
    """As those of images are, into the places of tokens; of as many ids as may be, too."""

    def forward(self: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = self.get_input_embeddings()(input_ids)
        rows[:, 1] = 0.25
        most = self.get_input_embeddings()(torch.arange(40).view(4, 10)).mul_(2.0)
        hidden = self.model(inputs_embeds=rows, use_cache=False).last_hidden_state
        return self.lm_head(hidden).float().log_softmax(-1)[..., 3].mean() + most.square().mean()

    return with_forward(model, forward, rank)


def frozen_and_padded() -> None:
    """A table that is not trained has no gradient, and a padding's row has zero."""
    padding = int(call_of(0)["input_ids"][0, 0])
    model, reference = both("ep", small(pad_token_id=padding), BOUND)
    assert model.get_input_embeddings().padding_idx == padding
    check_step(model, reference)
    for each in (model, reference):
        each.get_input_embeddings().weight.requires_grad_(False)
    check_step(model, reference)


def bad_input() -> None:
    """More ids than were promised, and ids that are in no table, are errors."""
    model, _ = both("ep", small(), BOUND)
    ids = torch.ones(3, 14, dtype=torch.int64)
    with pytest.raises(
        ValueError, match="the embedding got 42 tokens from one rank; it takes up to 40"
    ):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=r"ids of torch\.uint8; it takes"):
        model(input_ids=ids[:1].to(torch.uint8))
    for wrong in (-1, model.config.vocab_size):
        with pytest.raises(RuntimeError, match="an id is not in the embedding's table"):
            model(input_ids=torch.full((1, 4), wrong))


def mixed_dtypes() -> None:
    """Ids of one rank are of another width."""
    model, reference = both("ep", small(), BOUND)
    kinds = torch.int64, torch.int32

    def of_narrow_ids(each: Any, rank: int) -> torch.Tensor:
        call = call_of(rank)
        call["input_ids"] = call["input_ids"].to(kinds[rank])
        return each(**call).logits.float().log_softmax(-1)[..., 3].mean()

    check_gradients(model, reference, of_narrow_ids)


def left_to_fsdp() -> None:
    """A table that the head has, too; no experts to share out; what FSDP2 keeps on the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    tied, reference = both("ep", small(tie_word_embeddings=True), BOUND)
    assert not stays(tied)
    check_step(tied, reference)
    assert not stays(both("dp_shard", small(), BOUND)[0])
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    config = OptimizeConfig(max_tokens_per_rank=40, compile=False, fsdp=options)
    assert not stays(both("ep", small(), config)[0])


def on_two_ranks() -> None:
    steps()
    extended()
    calls()
    frozen_and_padded()
    mixed_dtypes()
    bad_input()
    left_to_fsdp()


def test_a_bound_lets_rows_stay() -> None:
    on_ranks(2, on_two_ranks)


def of_replicas() -> None:
    model, reference = both("dp_replicate x ep", small(), BOUND)
    assert stays(model)
    check_step(model, reference)
    check_gradients(model, reference, of_two_forwards)


def test_replicas_sum_their_gradients() -> None:
    on_ranks(4, of_replicas)


def tables() -> None:
    layout = layout_of(init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    assert layout is not None

    def stays(table: nn.Embedding, *others: nn.Module, most: int = 1) -> bool:
        return should_stay(nn.ModuleList([table, *others]), table, layout, most)

    plain, tied = nn.Embedding(5, 2), nn.Linear(2, 5, bias=False)
    assert stays(plain)
    assert stays(plain, most=2)
    assert not stays(plain, most=3)
    tied.weight = plain.weight
    assert not stays(plain, tied)
    special: list[dict[str, Any]] = [
        {"max_norm": 1.0},
        {"sparse": True},
        {"scale_grad_by_freq": True},
    ]
    assert not any(stays(nn.Embedding(5, 2, **options)) for options in special)


def test_only_plain_and_large_tables_stay() -> None:
    on_ranks(2, tables)


def test_what_has_no_tokens_has_no_embedding() -> None:
    class Images(PreTrainedModel):
        config_class = PretrainedConfig

    assert token_embedding(Images(PretrainedConfig())) is None
    assert token_embedding(nn.Embedding(2, 2)) is None
    model = small()
    assert token_embedding(model) is model.model.embed_tokens
