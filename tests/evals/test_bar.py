"""Progress of an evaluation: lines in a log file, a bar on a terminal, nothing on other ranks."""

import io
import logging
import sys

import pytest
from rich.console import Console

from crisp.evals import bar as bar_module
from crisp.evals.bar import bar


def test_a_log_file_gets_a_line_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), bar("ADE20K train", 10) as advance:
        for _ in range(3):
            advance(4)
    assert caplog.messages == ["ADE20K train: 10/10  0m00s, 0m00s left"], "once, and never more than all"


def test_a_log_file_gets_lines_on_the_way(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bar_module, "LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), bar("work", 3) as advance:
        advance(1)
        advance(1)
    assert [message.split("  ")[0] for message in caplog.messages] == ["work: 1/3", "work: 2/3"]


def test_silent(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO), bar("work", 1, silent=True) as advance:
        advance(1)
    assert caplog.messages == []
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_log_lines_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(bar_module, "Console", lambda **_: Console(file=screen, force_terminal=True, width=80))
    handler = logging.StreamHandler(screen)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with bar("a title that is much longer than half of the terminal has room for", 4) as advance:
            advance(2)
            root.warning("said in between")
            advance(2)
        assert handler.stream is screen, "handlers write where they did before"
    finally:
        root.removeHandler(handler)
    shown = screen.getvalue()
    assert "said in between\n" in shown
    assert "a title that is much longer than half o…" in shown
    assert "4/4" in shown
