import logging
import os
from pathlib import Path

import pytest

from moe_compile.timing.cache import TimingCache, default_path


def test_it_lies_in_the_users_folder_for_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOE_COMPILE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_path() == Path("~/.cache/moe_compile/timings.json").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_path() == Path("/caches/moe_compile/timings.json")
    monkeypatch.setenv("MOE_COMPILE_CACHE", "/elsewhere")
    assert default_path() == Path("/elsewhere/timings.json")


def test_records_are_added(tmp_path: Path) -> None:
    cache = TimingCache(tmp_path / "new" / "timings.json")
    assert cache.read("a") is None
    cache.add("a", {"torch": 1.5})
    cache.add("b", {"torch": 2.0, "liger": "it fails"})
    assert TimingCache(cache.path).read("a") == {"torch": 1.5}
    assert cache.read("b") == {"torch": 2.0, "liger": "it fails"}
    assert os.listdir(cache.path.parent) == ["timings.json"]


@pytest.mark.parametrize("text", ["", '{"a": ', "[]", '{"a": 1}', '{"a": {"torch": null}}', "\xff"])
def test_a_spoilt_file_is_named(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TimingCache(tmp_path / "timings.json")
    cache.path.write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert cache.read("a") is None
    assert f"the timings in {cache.path} cannot be read and are made anew" in caplog.text
    cache.add("a", {"torch": 1.0})
    assert cache.read("a") == {"torch": 1.0}


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.joinpath("file").touch()
    cache = TimingCache(tmp_path / "file" / "timings.json")
    with caplog.at_level(logging.WARNING):
        cache.add("a", {"torch": 1.0})
    assert "timings are not kept" in caplog.text
    assert "set MOE_COMPILE_CACHE to a folder" in caplog.text
