import io
import sys

import pytest

from moe_compile.timing import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_a_bar_on_a_terminal_after_a_second(delay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "DELAY", delay)
    bar = progress.Progress()
    bar.tell("rms_norm: torch")
    bar.close()
    assert ("timing rms_norm: torch" in terminal.getvalue()) == (delay == 0.0)


def test_no_bar_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    bar = progress.Progress()
    bar.tell("rms_norm: torch")
    bar.close()
    assert capsys.readouterr().err == ""
