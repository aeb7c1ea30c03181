"""A rank that hangs or dies ends the job within a timeout, and is named, in place of a silent wait in a collective.

Each rank's main thread marks where it is: an assignment. One thread per rank publishes that every few seconds in the
process group's store and reads the others'; another one judges (`crisp.training.liveness`) and, when some rank has not
come on for `rank_timeout_s`, logs who, where and since when, and this rank's own stack, then ends this process, so
that the launcher ends the job. Two threads, since the store itself may hang with the process that holds it.
"""

import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from crisp.distributed import World
from crisp.errors import CrispError
from crisp.training.liveness import QUIET_BEATS, SLOW_FACTOR, Beat, Ending, Phase, Sightings, moved

log = logging.getLogger(__name__)

EXIT_STATUS = os.EX_TEMPFAIL
"""75: the job may well succeed when it is continued."""

_LARGEST_INTERVAL_S = 5.0
_SHORTEST_COLLECTIVE_S = 600.0  # torch's own for NCCL: it also bounds how far apart ranks may start


def collective_timeout(rank_timeout_s: float) -> timedelta | None:
    """How long a collective may wait: longer than the heartbeat, which says more; None (torch's own) without one."""
    if rank_timeout_s == 0:
        return None
    return timedelta(seconds=max(_SHORTEST_COLLECTIVE_S, (SLOW_FACTOR + 1) * rank_timeout_s))


class Heartbeat:
    """Entered once the process group exists, left before it is destroyed. Does nothing in a world of one.

    Left by an error of a collective that another rank has caused, it raises a CrispError that names that rank.

    Args:
        world: this rank's.
        timeout_s: how long a rank may stand still; 0 for ever.
    """

    def __init__(self, world: World, *, timeout_s: float) -> None:
        self._rank, self._size, self._timeout_s = world.rank, world.size, timeout_s
        self._interval_s = min(_LARGEST_INTERVAL_S, timeout_s / 10)
        self._beat = Beat(rank=world.rank, host=socket.gethostname(), pid=os.getpid())
        self._sightings = Sightings(timeout_s=timeout_s, interval_s=self._interval_s)
        self._lock = threading.Lock()
        self._done, self._judging_done = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: Any = None
        self._store_error = ""
        self._answered_s = time.monotonic()
        self._main_thread = threading.get_ident()
        self._before_exit: list[Callable[[str], None]] = []

    def mark(self, step: int, phase: Phase, *, slow: bool = False) -> None:
        """Where the main thread is now. Every rank passes through the same places in the same order.

        Args:
            step: the one under way.
            phase: of it.
            slow: it may take `SLOW_FACTOR` times the timeout.
        """
        self._beat = moved(self._beat, step=step, phase=phase, slow=slow)

    def still_going(self) -> None:
        """A part of a long phase is done."""
        self._beat = moved(self._beat, step=self._beat.step, phase=self._beat.phase, slow=self._beat.slow)

    def before_exit(self, act: Callable[[str], None]) -> None:
        """Call this with the reason, perhaps in another thread, before another rank's fault ends the process."""
        self._before_exit.append(act)

    def __enter__(self) -> "Heartbeat":
        if self._size > 1 and self._timeout_s > 0:
            self._store = _connect(timedelta(seconds=max(5.0, min(60.0, self._timeout_s))))
            for target in (self._publish, self._judge):
                self._threads.append(threading.Thread(target=target, name=f"crisp-{target.__name__}", daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._threads:
            return
        self._judging_done.set()
        causes = self._causes() if isinstance(error, Exception) and _is_of_a_collective(error) else []
        if error is None:
            self._end("left", "")
        else:
            self._end("lost" if causes else "failed", f"{type(error).__name__}: {_first_line(error)}")
        if causes:
            self._tell(_advice(causes))
            raise CrispError(_advice(causes)) from error

    def _end(self, ending: Ending, reason: str) -> None:
        """Publish the end and stop the threads, without waiting for a store that doesn't answer."""
        self._beat = replace(self._beat, ending=ending, reason=reason)
        self._done.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=2 * self._interval_s)

    def _publish(self) -> None:
        """The first thread: tell, and hear."""
        known = False
        keys = [f"rank-{rank}" for rank in range(self._size)]
        number = 0
        while True:
            last = self._done.is_set()
            number += 1
            try:
                self._store.set(keys[self._rank], replace(self._beat, number=number).to_bytes())
                known = known or self._store.check(keys)  # at first, some have not published yet
                present = keys if known else [key for key in keys if self._store.check([key])]
                beats = [Beat.from_bytes(value) for value in self._store.multi_get(present)]
            except RuntimeError as error:  # what torch raises when the store is gone or silent
                with self._lock:
                    self._store_error = _first_line(error)
                return
            with self._lock:
                self._answered_s = time.monotonic()
                self._sightings.see(beats, self._answered_s)
            if last:
                return
            self._done.wait(self._interval_s)

    def _judge(self) -> None:
        """The second thread: end the process when there is a reason to."""
        looked_s = time.monotonic()
        suspected = 0
        while not self._judging_done.wait(self._interval_s):
            now_s = time.monotonic()
            with self._lock:
                if now_s - looked_s > QUIET_BEATS * self._interval_s:
                    self._sightings.forget_times(now_s)
                    self._answered_s = now_s
                found = self._sightings.culprits(now_s, but=self._rank) or self._store_trouble(now_s)
            looked_s = now_s
            # Whoever is told of the same trouble by an error in a collective says it better: leave them a moment.
            suspected = suspected + 1 if found else 0
            if suspected > QUIET_BEATS and not self._judging_done.is_set():
                self._end_process(found)

    def _store_trouble(self, now_s: float) -> list[str]:
        if self._sightings.has_left(0):  # with the store, if that was its own
            return []
        if self._store_error:
            return [f"{_store_holder(self._sightings)}: gone ({self._store_error})"]
        silent_s = now_s - self._answered_s
        if silent_s > self._timeout_s:
            return [f"{_store_holder(self._sightings)}: no answer for {silent_s:.0f} s: stopped, or cut off"]
        return []

    def _causes(self) -> list[str]:
        """Who else is the reason for an error in a collective; waits until a dead rank has been missed."""
        until_s = time.monotonic() + (QUIET_BEATS + 2) * self._interval_s
        while True:
            now_s = time.monotonic()
            with self._lock:
                found = self._sightings.gone(now_s, but=self._rank) or self._store_trouble(now_s)
            if found or now_s > until_s:
                return found
            time.sleep(self._interval_s / 4)

    def _tell(self, reason: str) -> None:
        for act in self._before_exit:
            act(reason)

    def _end_process(self, found: list[str]) -> None:
        frame = sys._current_frames().get(self._main_thread)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        log.error("this rank, %s, stands in %s:\n%s", self._beat.name, self._beat.place, stack.rstrip())
        reason = _advice(found)
        log.error("%s (rank_timeout_s=%g)", reason, self._timeout_s)
        self._end("lost", reason)
        self._tell(reason)
        for handler in logging.getLogger().handlers:
            handler.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_STATUS)


def _connect(timeout: timedelta) -> Any:
    """An own connection to the store of the process group: the group's is busy while it waits for a rank."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timeout,
    )
    # torchrun keeps its store through a restart: the beats of the attempt before mean nothing.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"crisp/heartbeat/{attempt}", store)


def _store_holder(sightings: Sightings) -> str:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"the launcher, which holds the job's store at {where}"
    return f"{sightings.name_of(0)}, which holds the job's store at {where}"


def _is_of_a_collective(error: Exception) -> bool:
    """NCCL's errors have a class; gloo's are plain RuntimeErrors that name its source files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _advice(found: list[str]) -> str:
    return f"{'; '.join(found)}; the job ends: look at that machine, then go on with 'crisp train --resume'"
