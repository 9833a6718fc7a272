"""Which ids verification draws where the experts' choices are known."""

from moe_compile.rewrite.choices import example_ids


def test_example_ids_differ_in_a_row_and_are_every_choice() -> None:
    ids = example_ids([6, 2], 5)
    assert ids.shape == (6, 2)
    assert (ids[:, 0] != ids[:, 1]).all()
    assert set(ids.flatten().tolist()) == set(range(5))
