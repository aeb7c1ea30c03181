"""What a run shows: whole lines on 80 columns, plain lines in a log file, nothing from silent ranks."""

import logging
import sys

import pytest

from crisp.progress import TrainProgress, describe, describe_rates

VALUES = {
    "step": 120, "epoch": 199, "loss": 22.123, "loss_cls": 9.0123, "loss_patch": 9.0123, "loss_region": 9.0123,
    "images_per_s": 12345.6, "data_wait_share": 1.0, "region_valid_frac": 1.0, "learning_rate": 1.23e-4,
    "step_s": 0.05,
}  # fmt: skip


def test_lines_fit_80_columns() -> None:
    assert max(len(line) for line in (describe(VALUES), describe_rates(VALUES))) <= 80


def test_a_log_file_gets_plain_lines_and_silent_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for silent in (False, True):
        with TrainProgress(steps=300_000, first_step=0, silent=silent) as progress:
            progress.advance(120)
            progress.show(VALUES)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (0 if silent else 1)
        if lines:
            assert lines[0].startswith("step    120/300000  epoch 199  loss 22.123 = cls 9.012")
            assert "data wait 100%" in lines[0]
            assert lines[0].endswith("4h09m left")


def test_a_terminal_shows_the_bar_above_the_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with TrainProgress(steps=300_000, first_step=0, silent=False) as progress:
        progress.advance(120_000)
        progress.show(VALUES)
    err = capsys.readouterr().err
    assert "120000/300000" in err
    assert describe(VALUES) in err
    assert "12345.6 img/s" in err


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_log_lines_stay_whole_above_the_bar(
    terminal: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", terminal), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    handler, stream = logging.StreamHandler(sys.stderr), sys.stderr
    logging.getLogger().addHandler(handler)
    try:
        with TrainProgress(steps=100, first_step=0, silent=False) as progress:
            assert (handler.stream is stream) == (terminal == "dumb")
            logging.getLogger().warning("a line of the log")
            progress.show(VALUES)
        assert handler.stream is stream
    finally:
        logging.getLogger().removeHandler(handler)
    err = capsys.readouterr().err
    lines = err.replace("\x1b[2K", "\n").replace("\r", "\n").splitlines()
    assert any(line.endswith("a line of the log") for line in lines)
    if terminal == "dumb":
        assert "\x1b[" not in err.replace("\x1b[0m", "")
        assert describe(VALUES) in err
