"""The tiles of quack's products: chosen here, as its own tuner would compile dozens for each.

They are the fastest, or nearly, of those that benchmarks/quack_tiles.py tried on an H200.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """What a block of threads computes at once.

    rows, columns: of the output. cluster: so many blocks of rows and of columns share what they
    load. pingpong: two groups of warps take turns, and one stores while the other multiplies; then
    columns are at most 208, as each holds a tile of its own.
    """

    rows: int
    columns: int
    cluster: tuple[int, int]
    pingpong: bool


_MANY_ROWS = 512
"""From so many rows a group on, those that larger tiles or pairs waste cost less than they save."""
_DEEP = 1024
"""From such a depth on, storing a tile takes little of its time."""


def product_tile(rows: int, columns: int, depth: int, gathers: bool) -> Tile:
    """For [rows, depth] @ [depth, columns] of each of many groups; `rows` is their mean.

    `gathers`: the rows come one by one, and so no two blocks of columns can share them.
    """
    is_many = rows >= _MANY_ROWS
    if not gathers and is_many and columns % 128 == 0:
        return Tile(192, 128, (1, 2), pingpong=True)
    if not gathers:
        return Tile(128, _least_waste(columns), (1, 2), pingpong=True)
    pair = (2, 1) if is_many else (1, 1)
    if depth >= _DEEP and columns % 256 == 0:
        return Tile(128, 256, pair, pingpong=False)
    return Tile(128, _least_waste(columns), pair, pingpong=True)


def weight_tile(rows: int, columns: int) -> Tile:
    """For the gradient of a weight, [rows, columns], over the rows of each group."""
    if columns % 256 == 0:
        return Tile(128, 256, (2, 1), pingpong=False)
    return Tile(128, _least_waste(columns), (2, 1), pingpong=True)


def _least_waste(columns: int) -> int:
    """The width, of those that two groups of warps can take turns at, that pads least."""
    return min((192, 128), key=lambda width: -columns % width)
