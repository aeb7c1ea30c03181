"""RUN/state.json: whether a run goes on, stopped, is complete or failed, and why. Written at its start and its end."""

import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

STATE_FILE = "state.json"

State = Literal["running", "stopped", "complete", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What the file holds."""

    state: State
    steps: int
    """That the whole run has"""
    host: str
    pid: int
    """Of the main rank"""
    began_ticks: int
    """When that process began, in the kernel's ticks since boot: process ids are used again"""
    reason: str = ""
    """Of a failure or a stop, one line"""


def write_state(run: Path, state: RunState) -> None:
    """Replace the file as a whole, so that no reader sees half of it."""
    partial = run / f".{STATE_FILE}.{os.getpid()}.partial"
    partial.write_text(json.dumps(asdict(state)) + "\n")
    partial.replace(run / STATE_FILE)


def read_state(run: Path) -> RunState | None:
    """What a run says about itself; None where it says nothing that can be read."""
    try:
        return RunState(**json.loads((run / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def is_alive(state: RunState) -> bool:
    """Whether the process that wrote this still runs; ask only on its own host."""
    return process_began_ticks(state.pid) == state.began_ticks


def process_began_ticks(pid: int) -> int | None:
    """Start of a process of this machine in ticks since boot; None if there is none, or it only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] == "Z" else int(fields[19])


class RecordedRun:
    """Keeps RUN/state.json while it is open: running, then how it ended.

    Args:
        run: the folder, which exists.
        steps: of the whole run.
    """

    def __init__(self, run: Path, *, steps: int) -> None:
        self._run = run
        self._state = RunState(
            state="running",
            steps=steps,
            host=socket.gethostname(),
            pid=os.getpid(),
            began_ticks=process_began_ticks(os.getpid()) or 0,
        )
        self._end = replace(self._state, state="complete")

    def stopped(self, reason: str) -> None:
        """It will end before its last step, because it was told to."""
        self._end = replace(self._state, state="stopped", reason=reason)

    def failed(self, reason: str) -> None:
        """Write at once that it failed."""
        write_state(self._run, replace(self._state, state="failed", reason=reason))

    def __enter__(self) -> "RecordedRun":
        write_state(self._run, self._state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            write_state(self._run, self._end)
        elif isinstance(error, KeyboardInterrupt):
            write_state(self._run, replace(self._state, state="stopped", reason="interrupted"))
        else:
            self.failed((str(error).strip().splitlines() or [type(error).__name__])[0])
