"""`crisp runs`: every run of a folder, how far it is, whether it goes on, and its last scores."""

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from crisp.errors import CrispError
from crisp.run_state import RunState, is_alive, read_state
from crisp.runs import CONFIG_FILE, KNN_FILE, METRICS_FILE

SILENT_S = 1800.0
"""A run of another machine that has logged nothing for so long is called silent: nobody here can ask for its process"""
_TAIL_BYTES = 65_536  # more than one line has


@dataclass(frozen=True, kw_only=True, slots=True)
class RunsConfig:
    """Which runs, and how they are listed."""

    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]] = Path("runs")
    """Folder that holds runs, or one run."""
    json: bool = False
    """Print JSON, one object per run, in place of the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """A line of the list."""

    name: str
    """Path below the folder"""
    recipe: str
    state: str
    """running, stopped, complete, failed, silent (see `SILENT_S`), or unknown (written before runs kept state)"""
    reason: str
    step: int
    steps: int | None
    loss: float | None
    knn_top1: float | None
    images_per_s: float | None
    age_s: float
    """Since the last line was logged, or since the run began"""


def main(config: RunsConfig) -> None:
    """Print the list.

    Raises:
        CrispError: no such folder.
    """
    runs = list_runs(config.folder)
    if config.json:
        print(json.dumps([asdict(run) for run in runs], indent=2))
        return
    console = Console(highlight=False)
    if not runs:
        console.print(f"{config.folder}: no runs yet", markup=False)
        return
    console.print(runs_table(runs))
    for run in runs:
        if run.state in ("failed", "silent") and run.reason:
            console.print(f"{run.name}: {run.reason}", markup=False)


def list_runs(folder: Path) -> list[RunSummary]:
    """The run that a folder is, or those in it and in its folders, newest last.

    Raises:
        CrispError: no such folder.
    """
    if not folder.is_dir():
        raise CrispError(f"{folder}: no such folder; give the one that holds your runs, as in 'crisp runs runs'")
    found = sorted({path.parent for pattern in ("", "*/", "*/*/") for path in folder.glob(f"{pattern}{CONFIG_FILE}")})
    summaries = (summarise(run, name=str(run.relative_to(folder)) if run != folder else run.name) for run in found)
    return sorted((summary for summary in summaries if summary), key=lambda summary: -summary.age_s)


def summarise(run: Path, *, name: str) -> RunSummary | None:
    """What one folder says; None if its config is not that of a run."""
    try:
        recipe = json.loads((run / CONFIG_FILE).read_text())["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    metrics, knn, state = _last_line(run / METRICS_FILE), _last_line(run / KNN_FILE), read_state(run)
    times = [path.stat().st_mtime for path in (run / CONFIG_FILE, run / METRICS_FILE) if path.exists()]
    age_s = max(0.0, time.time() - max(times))
    told, reason = _judge(state, age_s)
    return RunSummary(
        name=name,
        recipe=recipe,
        state=told,
        reason=reason,
        step=metrics.get("step", 0),
        steps=state.steps if state else None,
        loss=metrics.get("loss"),
        knn_top1=knn.get("top1"),
        images_per_s=metrics.get("images_per_s"),
        age_s=age_s,
    )


def _judge(state: RunState | None, age_s: float) -> tuple[str, str]:
    """A run's state and its reason: one that says it is running may have been killed."""
    if state is None:
        return "unknown", ""
    if state.state != "running":
        return state.state, state.reason
    if state.host == socket.gethostname():
        gone = f"process {state.pid} is gone without a word (killed?); 'crisp train --resume' goes on"
        return ("running", "") if is_alive(state) else ("failed", gone)
    if age_s > SILENT_S:
        return "silent", f"nothing logged for {_age(age_s)}; its process {state.pid} is on {state.host}"
    return "running", ""


def _last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a file of JSON lines, read from its end; {} if there is none."""
    for line in _tail(path):
        try:
            value = json.loads(line)
        except ValueError:
            continue  # half a line, at the start of what was read
        if isinstance(value, dict):
            return value
    return {}


def _tail(path: Path) -> Iterator[bytes]:
    """Whole lines, the last one first."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return
    yield from (line for line in reversed(lines) if line.endswith(b"\n"))


def runs_table(runs: list[RunSummary]) -> Table:
    """For a terminal of 80 columns or more."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", no_wrap=True, overflow="ellipsis", max_width=18)
    table.add_column("recipe", no_wrap=True, overflow="ellipsis", max_width=12)
    for name in ("step", "state", "loss", "k-NN", "img/s", "age"):
        table.add_column(name, no_wrap=True, justify="left" if name == "state" else "right")
    for run in runs:
        table.add_row(
            run.name, run.recipe, _share(run), run.state, _number(run.loss, ".2f"), _number(run.knn_top1, ".1%"),
            _number(run.images_per_s, ".0f"), _age(run.age_s),
        )  # fmt: skip
    return table


def _share(run: RunSummary) -> str:
    """Steps done, and of how many; short where they are many."""
    return f"{_short(run.step)}/{_short(run.steps) if run.steps else '?'}"


def _short(steps: int) -> str:
    return str(steps) if steps < 10_000 else f"{steps / 1000:.0f}k"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"
