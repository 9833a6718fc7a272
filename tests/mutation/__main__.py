"""Plants each bug in a copy of the library and runs the tests that should notice.

    python -m tests.mutation [--jobs N] [words of the bugs to plant]

Ends with 1 where fewer than 95 % are noticed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutation.bugs import BUGS, Bug

ROOT = Path(__file__).parents[2]
NOTICED = 0.95
_COPIED = ("moe_compile", "passes", "patterns", "tests", "pyproject.toml")
_PASSED, _FAILED = 0, 1  # pytest's exit codes; any other says that it could not test


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="of the bugs to plant; none for all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in its copy")
    given = parser.parse_args()
    chosen = [bug for bug in BUGS if all(word in f"{bug.what} {bug.file}" for word in given.words)]
    tests = list(dict.fromkeys(test for bug in chosen for test in bug.tests))
    with ThreadPoolExecutor(given.jobs) as pool:
        failing = [t for t, fine in zip(tests, pool.map(_passes, tests), strict=True) if not fine]
        assert not failing, f"without a bug the tests pass, but not {failing}"
        noticed = sum(pool.map(_is_noticed, chosen))
    print(f"{noticed} of {len(chosen)} noticed")
    return 0 if noticed >= NOTICED * len(chosen) else 1


def _copy(target: Path) -> None:
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True)
        else:
            shutil.copy(source, target / name)


def _passes(test: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        _copy(Path(folder))
        return _run(Path(folder), [test]) == _PASSED


def _is_noticed(bug: Bug) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        _copy(Path(folder))
        path = Path(folder, bug.file)
        original = path.read_text()
        assert original.count(bug.before) == 1, f"{bug.file} has it once: {bug.before!r}"
        path.write_text(original.replace(bug.before, bug.after))
        status = _run(Path(folder), bug.tests)
    assert status in (_PASSED, _FAILED), f"pytest ended with {status}: {bug.what}"
    print(f"{'noticed' if status == _FAILED else 'MISSED '}  {bug.file}: {bug.what}", flush=True)
    return status == _FAILED


def _run(copy: Path, tests: Iterable[str]) -> int:
    """Pytest's exit code, of what `make test` runs of these tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    selected = ["-m", "not matrix and not long", "--rootdir", str(copy)]
    path = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, *selected, *tests], cwd=copy, env=environment, capture_output=True, text=True
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
