"""The products of an experts block by torch's `grouped_mm`, of rows that are gathered first."""

from torch import Tensor

from moe_compile.kernels.expert_block import Picked, Products, Where, register_products
from moe_compile.kernels.expert_rows import spread_rows, spread_rows_again
from moe_compile.kernels.grouped_mm import grouped_linear, grouped_weight_grad

NAME = "grouped_mm"


def _gather(x: Tensor, where: Where, after: Tensor | None) -> Picked:
    indices = where.order, where.inverse, where.offs, where.picks
    if after is None:
        return spread_rows(x, *indices), None
    return spread_rows_again(x, *indices, after), None


def _product(rows: Picked, w: Tensor, where: Where, transposed: bool) -> Tensor:
    return grouped_linear(rows[0], w, where.offs, transposed)


def _weight_grad(rows: Picked, others: Tensor, where: Where, transposed: bool) -> Tensor:
    pair = (others, rows[0]) if transposed else (rows[0], others)
    return grouped_weight_grad(*pair, where.offs)


register_products(NAME, Products(Where, _gather, _product, _weight_grad))
