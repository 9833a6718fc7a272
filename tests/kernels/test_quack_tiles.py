import pytest

from moe_compile.kernels.quack_tiles import product_tile, weight_tile


@pytest.mark.parametrize("rows", [1, 512, 4096])
@pytest.mark.parametrize("columns", [8, 128, 264, 768, 1408, 1536, 2048])
@pytest.mark.parametrize("depth", [64, 768, 2048])
@pytest.mark.parametrize("gathers", [False, True])
def test_the_kernels_have_these_tiles(rows: int, columns: int, depth: int, gathers: bool) -> None:
    for tile in (product_tile(rows, columns, depth, gathers), weight_tile(depth, columns)):
        assert (tile.rows, tile.columns) == (192, 128) or tile.rows == 128
        assert tile.columns % 16 == 0
        assert tile.columns <= (208 if tile.pingpong else 256)
        assert tile.cluster[0] * tile.cluster[1] <= 2
    assert not gathers or product_tile(rows, columns, depth, gathers).cluster[1] == 1
    assert weight_tile(depth, columns).cluster[1] == 1  # it gathers


def test_a_tile_pads_little() -> None:
    assert product_tile(512, 384, 64, gathers=True).columns == 192
    assert product_tile(512, 128, 64, gathers=True).columns == 128
