"""Jobs of several commands each, several jobs at once, one per slot of the machine."""

import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from crisp.progress import describe_time

log = logging.getLogger(__name__)

_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A share of the machine: some GPUs, or all of a machine without."""

    name: str
    """`GPU 0`, `CPU`"""
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of this process's"""
    options: tuple[str, ...] = ()
    """Of `crisp train` there, which change no weight"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One command of a job."""

    name: str
    command: Callable[[Slot], Sequence[str]]
    """Made when its turn has come"""
    done: Callable[[], bool]
    """Whether there is nothing left to do; asked before, and after it has run"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Stages in order, for one slot."""

    name: str
    log: Path
    stages: Sequence[Stage]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a job ended before its end."""

    job: str
    stage: str
    reason: str
    log: Path

    def __str__(self) -> str:
        return f"{self.job}: {self.stage} {self.reason}; its log is {self.log}"


class _Work:
    """What the threads share."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            self.waiting.put(job)
        self.total, self.ended = len(jobs), 0
        self.failures: dict[str, Failure] = {}
        self.errors: list[BaseException] = []
        self.stopping = False
        self.lock = threading.Lock()
        self.serving = 0
        self.running: set[subprocess.Popen[bytes]] = set()

    def stop(self, number: int) -> None:
        """Begin nothing more, and signal what runs. A trainer saves and leaves on SIGTERM."""
        with self.lock:
            self.stopping = True
            for process in self.running:
                # Only the process itself, not its group: a loader's workers would be gone before the trainer has saved.
                process.send_signal(number)

    def serve(self, slot: Slot) -> None:
        """Begin a thread for a slot."""
        with self.lock:
            self.serving += 1
        threading.Thread(target=_serve, args=(self, slot), name=slot.name).start()

    def wait(self) -> None:
        """Until no slot serves any more. (`Thread.join`, when Ctrl-C interrupts it, takes the thread for ended.)"""
        while self.serving:
            time.sleep(_POLL_S)

    def leave(self) -> None:
        """A slot's thread ends."""
        with self.lock:
            self.serving -= 1

    def start(self, command: Sequence[str], slot: Slot, output: Path) -> subprocess.Popen[bytes] | None:
        """A process of its own session, so that Ctrl-C reaches this one alone; None if all is to stop."""
        with self.lock, output.open("ab") as file:
            if self.stopping:
                return None
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **slot.environment},
                start_new_session=True,
            )
            self.running.add(process)
            return process


def run_jobs(jobs: Sequence[Job], slots: Sequence[Slot]) -> dict[str, Failure]:
    """Run every job, as many at once as there are slots; one that fails does not stop the others.

    On Ctrl-C or SIGTERM the commands get SIGTERM, are waited for, and KeyboardInterrupt is raised; a second one kills
    them.

    Returns:
        What failed, by job.
    """
    work = _Work(jobs)
    with _terminable():
        try:
            for slot in slots:
                work.serve(slot)
            work.wait()
        except KeyboardInterrupt:
            log.info("stopping: what runs is told to save and to leave; a second Ctrl-C kills it")
            work.stop(signal.SIGTERM)
            try:
                work.wait()
            except KeyboardInterrupt:
                work.stop(signal.SIGKILL)
                work.wait()
            raise
    if work.errors:
        raise work.errors[0]
    return work.failures


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is as Ctrl-C while this is open."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve(work: _Work, slot: Slot) -> None:
    """Take jobs until there is none."""
    try:
        while not work.stopping:
            try:
                job = work.waiting.get_nowait()
            except queue.Empty:
                return
            failure = _run(work, job, slot)
            with work.lock:
                work.ended += 1
                if failure is not None:
                    work.failures[job.name] = failure
            if failure is not None and not work.stopping:
                log.error("%d of %d: %s", work.ended, work.total, failure)
    except BaseException as error:  # noqa: BLE001  # raised again by the thread that waits
        work.errors.append(error)
        work.stop(signal.SIGTERM)
    finally:
        work.leave()


def _run(work: _Work, job: Job, slot: Slot) -> Failure | None:
    began_s = time.monotonic()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    for stage in job.stages:
        if stage.done():
            continue
        command = stage.command(slot)
        log.info("%s: %s begins on %s, log %s", job.name, stage.name, slot.name, job.log)
        start = job.log.stat().st_size if job.log.exists() else 0
        process = work.start(command, slot, job.log)
        if process is None:
            return _failure(job, stage, "was not begun, all is to stop")
        status = process.wait()
        with work.lock:
            work.running.discard(process)
        if status != 0:
            return _failure(job, stage, f"ended with status {status}: {_last_line(job.log, start)}")
        if not stage.done():
            return _failure(job, stage, f"ended before it was done: {_last_line(job.log, start)}")
    if not work.stopping:
        log.info("%s: done in %s", job.name, describe_time(time.monotonic() - began_s))
    return None


def _failure(job: Job, stage: Stage, reason: str) -> Failure:
    return Failure(job=job.name, stage=stage.name, reason=reason, log=job.log)


def _last_line(path: Path, start: int) -> str:
    """The last line that a command printed, of what the log holds from byte `start` on."""
    with path.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
