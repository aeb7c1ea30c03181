"""`crisp runs`: states, scores, width."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from crisp.cli import main
from crisp.recipes import demo
from crisp.run_list import SILENT_S, list_runs, runs_table
from crisp.run_state import RecordedRun, RunState, process_began_ticks, read_state, write_state
from crisp.runs import KNN_FILE, METRICS_FILE, create_run


def make(folder: Path, name: str, state: RunState | None = None, *, step: int = 120) -> Path:
    run = folder / name
    create_run(replace(demo(), out=run))
    line = {"step": step, "loss": 12.345, "images_per_s": 12345.6}
    (run / METRICS_FILE).write_text(json.dumps({"step": 1}) + "\n" + json.dumps(line) + "\n" + '{"step": 99')
    (run / KNN_FILE).write_text(json.dumps({"step": 100, "top1": 0.756}) + "\n")
    if state:
        write_state(run, state)
    return run


def here(**changes: object) -> RunState:
    ticks = process_began_ticks(os.getpid())
    assert ticks is not None
    state = RunState(state="running", steps=1_000_000, host=os.uname().nodename, pid=os.getpid(), began_ticks=ticks)
    return replace(state, **changes)  # type: ignore[arg-type]


def test_every_state_is_told_apart(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    make(tmp_path, "alive", here())
    make(tmp_path, "killed", here(pid=gone.pid))
    make(tmp_path, "reused", here(began_ticks=1))
    make(tmp_path, "elsewhere", here(host="another"))
    silent = make(tmp_path, "group/silent", here(host="another"))
    make(tmp_path, "failed", here(state="failed", reason="no space"))
    make(tmp_path, "complete", here(state="complete"))
    make(tmp_path, "old")
    for path in (silent / METRICS_FILE, silent / "config.json"):
        os.utime(path, (0, 0))
    (tmp_path / "no run").mkdir()
    found = {run.name: run for run in list_runs(tmp_path)}
    assert {name: run.state for name, run in found.items()} == {
        "alive": "running", "killed": "failed", "reused": "failed", "elsewhere": "running", "group/silent": "silent",
        "failed": "failed", "complete": "complete", "old": "unknown",
    }  # fmt: skip
    alive = found["alive"]
    assert (alive.step, alive.steps, alive.recipe) == (120, 1_000_000, "demo")
    assert (alive.loss, alive.knn_top1) == (12.345, 0.756)
    assert found["failed"].reason == "no space"
    assert "is gone" in found["killed"].reason
    assert found["group/silent"].age_s > SILENT_S
    assert [run.name for run in list_runs(tmp_path / "alive")] == ["alive"]


def test_the_table_fits_80_columns(tmp_path: Path) -> None:
    make(tmp_path, "a-run-with-a-long-name-that-says-everything", here(), step=123_456)
    make(tmp_path, "b", here(state="complete"))
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(runs_table(list_runs(tmp_path)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    for word in ("demo", "123k/1000k", "running", "complete", "12.35", "75.6%", "12346"):
        assert any(word in line for line in lines), word


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "one", here(state="failed", reason="rank 1 hangs"))
    assert main(["runs", str(tmp_path)]) == 0
    assert "one: rank 1 hangs" in capsys.readouterr().out
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "one"
    assert main(["runs", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_run_records_how_it_ends(tmp_path: Path) -> None:
    def state() -> tuple[str, str]:
        found = read_state(tmp_path)
        assert found is not None
        return found.state, found.reason

    with RecordedRun(tmp_path, steps=9):
        assert state() == ("running", "")
    assert state() == ("complete", "")
    with RecordedRun(tmp_path, steps=9) as record:
        record.stopped("told to")
    assert state() == ("stopped", "told to")
    for error, expected in ((ValueError("a\nb"), ("failed", "a")), (KeyboardInterrupt(), ("stopped", "interrupted"))):
        with pytest.raises(type(error)), RecordedRun(tmp_path, steps=9):
            raise error
        assert state() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
