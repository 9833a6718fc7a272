"""Rows for the picks that were promised, where the experts of a rank could get many more."""

import torch
from torch import Tensor


def limit_picks(ids: Tensor, most: int) -> Tensor:
    """`ids` [U, K], of which no more than `most` are other than -1.

    Raises:
        RuntimeError: if more are; on a GPU later, and for the whole process, whose device stops.
    """
    checked: Tensor = _check(ids, most)
    return checked


def limit_places(places: Tensor, most: int) -> Tensor:
    """`places` [P, 0] for `most` picks, if P is not smaller."""
    fewer: Tensor = _cut(places, most)
    return fewer


@torch.library.custom_op("moe_compile::limit_places", mutates_args=())
def _cut(places: Tensor, most: int) -> Tensor:
    return places.new_empty(min(most, places.shape[0]), 0)


@_cut.register_fake
def _(places: Tensor, most: int) -> Tensor:
    rows = torch.sym_min(most, places.shape[0])
    return places.new_empty(rows, 0)  # pyright: ignore[reportArgumentType]


@torch.library.custom_op("moe_compile::limit_picks", mutates_args=())
def _check(ids: Tensor, most: int) -> Tensor:
    torch.ops.aten._assert_async.msg(
        (ids >= 0).sum() <= most,
        f"the experts of a rank got more than the {most} picks that LimitPicks promised; give it a "
        "larger number, or leave it out",
    )
    return ids.clone()  # whoever reads them comes after the check


@_check.register_fake
def _(ids: Tensor, most: int) -> Tensor:
    return torch.empty_like(ids)
