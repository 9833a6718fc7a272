"""The pages of docs/ whose code runs: every block of Python in order, printing what is shown."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["new_architecture.md"]
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(page: Path, text: str, block: re.Match[str], namespace: dict[str, Any]) -> str:
    """What a block prints; its lines have the numbers that they have on the page."""
    above = text.count("\n", 0, block.start(2))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * above + block[2], page, "exec"), namespace)
    return printed.getvalue()


def plain(text: str) -> str:
    """Without what differs between releases of torch: the numbers of nodes, and widths."""
    words = re.sub(r"(?<=[a-z])_\d+\b", "", text).replace("-", "").split()
    return " ".join(words)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_prints_what_it_shows(name: str) -> None:
    page, namespace = DOCS / name, dict[str, Any](__name__="page")
    text, printed = page.read_text(encoding="utf-8"), ""
    for block in BLOCK.finditer(text):
        if block[1] == "python":
            printed = run(page, text, block, namespace)
        else:
            assert plain(block[2]) in plain(printed)


def counts(text: str, pattern: str) -> list[int]:
    """The numbers of a sentence, wherever its lines end."""
    found = re.search(pattern, " ".join(text.split()))
    assert found is not None
    return [int(number) for number in found.groups()]


def test_the_readme_sums_up_the_table_of_families() -> None:
    table = (DOCS / "families.md").read_text(encoding="utf-8")
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    written = counts(
        table,
        r"Of (\d+) families, (\d+) have all of their experts rewritten and (\d+) some; on two "
        r"ranks, (\d+) of \d+ give .*?, (\d+) of them with all experts spread",
    )
    assert written == counts(
        readme,
        r"Of the (\d+) families of .*?, (\d+) have all of their experts rewritten and (\d+) some; "
        r"on two ranks, (\d+) give .*?, (\d+) of them with all experts spread",
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    experts = [row[1] for row in rows if len(row) == 9 and re.search(r"\d|refused|-", row[1])]
    experts = [cell for cell in experts if not set(cell) <= {"-"}]
    some = [cell for cell in experts if "refused" in cell and "," in cell]
    whole = [cell for cell in experts if "refused" not in cell]
    assert [len(experts), len(whole), len(some)] == written[:3]
