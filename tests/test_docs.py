"""The pages of docs/ whose code runs: every block of Python in order, printing what is shown."""

import contextlib
import io
import linecache
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["new_architecture.md"]
_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_TIMES = re.compile(r"^\d+ captures; .*$", re.MULTILINE)


def run(code: str, name: str, namespace: dict[str, Any]) -> str:
    """What a block prints; its lines can be shown, as those of a file."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), namespace)
    return _TIMES.sub("", printed.getvalue())


@pytest.mark.parametrize("page", PAGES)
def test_the_page_prints_what_it_shows(page: str) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    printed = ""
    for number, (language, block) in enumerate(_BLOCK.findall((DOCS / page).read_text())):
        if language == "python":
            printed = run(block, f"{page}_{number}.py", namespace)
        else:
            shown = [line.strip() for line in block.strip().splitlines()]
            assert "\n".join(shown) in "\n".join(line.strip() for line in printed.splitlines())
