"""Plants each bug in a copy of the library and runs the tests that should notice.

    python -m tests.mutation [words of the bugs to plant]

Ends with 1 where fewer than 95 % are noticed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.mutation.bugs import BUGS, Bug

ROOT = Path(__file__).parents[2]
NOTICED = 0.95
_COPIED = ("moe_compile", "passes", "patterns", "tests", "pyproject.toml")
_PASSED, _FAILED = 0, 1  # pytest's exit codes; any other says that it could not test


def main(words: list[str]) -> int:
    """Returns the exit status."""
    chosen = [bug for bug in BUGS if all(word in f"{bug.what} {bug.file}" for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        _copy(copy)
        tests = dict.fromkeys(test for bug in chosen for test in bug.tests)
        assert _run(copy, tests) == _PASSED, "without a bug the tests pass"
        noticed = sum(_is_noticed(copy, bug) for bug in chosen)
    print(f"{noticed} of {len(chosen)} noticed")
    return 0 if noticed >= NOTICED * len(chosen) else 1


def _copy(target: Path) -> None:
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True)
        else:
            shutil.copy(source, target / name)


def _is_noticed(copy: Path, bug: Bug) -> bool:
    path = copy / bug.file
    original = path.read_text()
    assert original.count(bug.before) == 1, f"{bug.file} has it once: {bug.before!r}"
    path.write_text(original.replace(bug.before, bug.after))
    status = _run(copy, bug.tests)
    path.write_text(original)
    assert status in (_PASSED, _FAILED), f"pytest ended with {status}: {bug.what}"
    print(f"{'noticed' if status == _FAILED else 'MISSED '}  {bug.file}: {bug.what}", flush=True)
    return status == _FAILED


def _run(copy: Path, tests: Iterable[str]) -> int:
    """Pytest's exit code, of what `make test` runs of these tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    selected = ["-m", "not matrix and not long", "--rootdir", str(copy)]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, *selected, *tests], cwd=copy, env=environment, capture_output=True, text=True
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
