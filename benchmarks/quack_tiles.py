"""The six products of an experts block by quack, with every tile that may suit, on one Hopper GPU.

python benchmarks/quack_tiles.py
python benchmarks/quack_tiles.py --shapes 8192,2048,768,128,8 --compile-only

For each product, TFLOP/s of the tiles, best first, of the one that `quack_tiles.py` chooses, and of
torch's `grouped_mm` on rows that are gathered already; where quack gathers, also without that. The
picks are random.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from machine import describe, markdown
from timing import failure, milliseconds
from torch import Tensor

from moe_compile.kernels import quack
from moe_compile.kernels.expert_block import Where
from moe_compile.kernels.expert_rows import group_picks
from moe_compile.kernels.quack import quack_product, quack_weight_grad, where_rows_are
from moe_compile.kernels.quack_tiles import Tile, product_tile, weight_tile

SHAPES = ("32768,2048,768,128,8", "8192,2048,768,128,8")
ALONE, ROWS, COLUMNS = (1, 1), (2, 1), (1, 2)
Run = Callable[[], Tensor]
Case = tuple[str, Run, Run, Tile, bool]
"""A name, quack's and torch's way, the tile chosen, and whether rows are gathered."""


def tiles(gathers: bool) -> Iterator[Tile]:
    """Those that compile and hold their numbers in registers."""
    clusters = (ALONE, ROWS) if gathers else (ALONE, ROWS, COLUMNS)
    both = [(128, 256), (256, 128), (256, 192)]
    turns = [(128, 128), (128, 160), (128, 192), (192, 128)]
    for (rows, columns), cluster in itertools.product(both, clusters):
        yield Tile(rows, columns, cluster, pingpong=False)
    for (rows, columns), cluster in itertools.product(turns, clusters):
        yield Tile(rows, columns, cluster, pingpong=True)


def cases(x: Tensor, grad: Tensor, up: Tensor, down: Tensor, where: Where) -> Iterator[Case]:
    """The six products: x, grad are [T, H], up is [E, 2I, H], down is [E, H, I]."""
    hidden, width, rows = x.shape[1], down.shape[2], where.tokens.shape[0]
    pre, act = (x.new_empty(rows, n).normal_() for n in (2 * width, width))
    ends, tokens, offs = where.ends, where.tokens, where.offs
    spread = x[tokens.long()]
    products = {
        "up": (x, up, True, tokens),
        "up, gathered before": (spread, up, True, None),
        "down": (act, down, True, None),
        "gradient of the activation": (grad, down, False, tokens),
        "gradient of the activation, gathered before": (grad[tokens.long()], down, False, None),
        "gradient of the rows": (pre, up, False, None),
    }
    for name, (a, w, transposed, of) in products.items():
        matrices, all_rows = w.mT if transposed else w, a if of is None else a[of.long()]
        depth, columns = matrices.shape[1:]
        yield (
            name,
            partial(quack_product, a, w, ends, of, transposed),
            partial(F.grouped_mm, all_rows, matrices, offs=offs),
            product_tile(rows // up.shape[0], columns, depth, of is not None),
            of is not None,
        )
    for name, of_rows, transposed in (("up", pre, True), ("down", act, False)):
        for a, of in ((x, tokens), (spread, None)):
            yield (
                f"gradient of {name}" + ", gathered before" * (of is None),
                partial(quack_weight_grad, a, of_rows, ends, of, transposed),
                partial(F.grouped_mm, spread.t(), of_rows, offs=offs),
                weight_tile(hidden, of_rows.shape[1]),
                of is not None,
            )


def with_tile(tile: Tile, run: Run) -> Run:
    """`run` on another tile."""
    chosen = {name: lambda *_: tile for name in ("product_tile", "weight_tile")}

    def patched() -> Tensor:
        with mock.patch.multiple(quack, **chosen):
            return run()

    return patched


def setting(shape: str, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Where]:
    """What the products multiply."""
    tokens, hidden, width, experts, picks = map(int, shape.split(","))
    torch.manual_seed(0)
    with torch.device(device):
        made = [(tokens, hidden)] * 2 + [(experts, 2 * width, hidden), (experts, hidden, width)]
        x, grad, up, down = (torch.randn(sizes, dtype=torch.bfloat16) for sizes in made)
        ids = torch.rand(tokens, experts).topk(picks).indices
    return x, grad, up, down, where_rows_are(picks, *group_picks(ids, experts))


def compete(shape: str, compile_only: bool) -> list[tuple[str, ...]]:
    """A row for each tile of each product."""
    made = setting(shape, "cuda")
    rows = list[tuple[str, ...]]()
    for name, ours, torchs, chosen, gathers in cases(*made):
        wanted, found = torchs().float(), dict[str, float]()
        size = 2 * made[-1].tokens.shape[0] * _area(name, *made[:4])

        def rate(run: Run, size: int = size) -> float:
            return 0.0 if compile_only else size / milliseconds(run, 10, ahead=True) / 1e9

        for tile in tiles(gathers):
            run = with_tile(tile, ours)
            label = f"{tile.rows} x {tile.columns}, {tile.cluster}" + ", pingpong" * tile.pingpong
            try:
                out = run().float()
                error = float((out - _like(wanted, out)).norm() / wanted.norm())
                label += "" if error < 0.01 else f", WRONG: {error:.1e}"
                found[label + ", chosen" * (tile == chosen)] = rate(run)
            except Exception as problem:
                found[f"{label}: {failure(problem)}"] = 0.0
        found["torch"] = rate(torchs)
        best = sorted(found.items(), key=lambda item: -item[1])
        rows += [(shape, name, label, f"{number:.0f}") for label, number in best]
    return rows


def _area(name: str, x: Tensor, grad: Tensor, up: Tensor, down: Tensor) -> int:
    """Multiplications for each row."""
    is_up = name.partition(",")[0] in ("up", "gradient of the rows", "gradient of up")
    return (up if is_up else down)[0].numel()


def _like(wanted: Tensor, found: Tensor) -> Tensor:
    return wanted if wanted.shape == found.shape else wanted.mT


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="T,H,I,E,K")
    parser.add_argument("--compile-only", action="store_true", help="time nothing")
    args = parser.parse_args()
    rows = [row for shape in args.shapes for row in compete(shape, args.compile_only)]
    print(describe())
    print(markdown(("T,H,I,E,K", "product", "tile", "TFLOP/s"), rows))


if __name__ == "__main__":
    main()
