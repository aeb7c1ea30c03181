"""Which rank holds up a job: judged from what all ranks tell about themselves, without threads, clocks or sockets."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import Literal

SLOW_FACTOR = 6
"""A phase that may be slow (start-up, compilation, a checkpoint, k-NN) is given this many times the timeout."""
QUIET_BEATS = 3
"""A rank that has missed this many beats is quiet: others may stand still because of it, so nobody else is blamed."""


class Phase(IntEnum):
    """What a rank's main thread does, in the order of a step.

    Ranks that wait in a collective have reached a later one than the rank that they wait for, or the same.
    """

    STARTING = 0
    WAITING_FOR_DATA = 1
    TRAINING = 2
    LOGGING = 3
    SAVING = 4
    EVALUATING = 5

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


Ending = Literal["", "left", "lost", "failed"]
"""Not ended; done; ended because of another rank; ended by an error of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """What a rank tells: where its main thread is, and, by the number of the beat, that the process runs at all."""

    rank: int
    host: str
    pid: int
    number: int = 0
    """Of this beat"""
    step: int = -1
    """The step under way; −1 before the first"""
    phase: Phase = Phase.STARTING
    slow: bool = True
    """This phase may take `SLOW_FACTOR` times as long"""
    moves: int = 0
    """Grows with everything that the main thread gets done"""
    ending: Ending = ""
    reason: str = ""

    @property
    def name(self) -> str:
        """Who it is, for a message."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"{self.phase} of step {self.step}" if self.step >= 0 else str(self.phase)

    def to_bytes(self) -> bytes:
        """For the store."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_bytes(data: bytes) -> "Beat":
        """Inverse of `to_bytes`."""
        values = json.loads(data)
        return Beat(**{**values, "phase": Phase(values["phase"])})


class Sightings:
    """The newest beat of every rank, and since when it tells the same. All times are this rank's own clock, in s."""

    def __init__(self, *, timeout_s: float, interval_s: float) -> None:
        self._timeout_s, self._interval_s = timeout_s, interval_s
        self._beats: dict[int, Beat] = {}
        self._alive_s: dict[int, float] = {}
        self._moved_s: dict[int, float] = {}

    def see(self, beats: Iterable[Beat], now_s: float) -> None:
        """Take note of what the ranks have published."""
        for beat in beats:
            before = self._beats.get(beat.rank)
            if before is None or before.number != beat.number:
                self._alive_s[beat.rank] = now_s
            if before is None or (before.moves, before.step, before.phase) != (beat.moves, beat.step, beat.phase):
                self._moved_s[beat.rank] = now_s
            self._beats[beat.rank] = beat

    def forget_times(self, now_s: float) -> None:
        """Count anew: this process itself was stopped for a while, so the times of the others mean nothing."""
        self._alive_s = dict.fromkeys(self._beats, now_s)
        self._moved_s = dict.fromkeys(self._beats, now_s)

    def gone(self, now_s: float, *, but: int) -> list[str]:
        """One line for each rank but this one that has failed or is quiet: why a collective broke."""
        return self._failed(but) + [
            f"{beat.name}: no sign of life for {now_s - self._alive_s[rank]:.0f} s, last seen in {beat.place}"
            for rank, beat in self._running().items()
            if rank != but and self._is_quiet(rank, now_s)
        ]

    def culprits(self, now_s: float, *, but: int) -> list[str]:
        """One line for each rank that the job has waited for longer than it may; none while all is well.

        Ranks that merely wait for another in a collective are not named: they have come further than it has. Where
        all stand at the same place, all are named.

        Args:
            now_s: the clock.
            but: this rank; its own failure is told by whoever failed.
        """
        failed = self._failed(but)
        running = self._running()
        silent = [
            f"{beat.name}: no sign of life for {now_s - self._alive_s[rank]:.0f} s, last seen in {beat.place}: "
            f"stopped, killed, or cut off from the network"
            for rank, beat in running.items()
            if now_s - self._alive_s[rank] > self._timeout_s
        ]
        if failed or silent or not running or any(self._is_quiet(rank, now_s) for rank in running):
            return failed + silent
        last = min((beat.step, beat.phase) for beat in running.values())
        behind = {rank: beat for rank, beat in running.items() if (beat.step, beat.phase) == last}
        waiting = len(running) - len(behind)
        why = f"{waiting} rank(s) wait for it" if waiting else "no rank gets on: a collective or a kernel hangs"
        return [
            f"{beat.name}: {now_s - self._moved_s[rank]:.0f} s without progress in {beat.place}; {why}"
            for rank, beat in behind.items()
            if now_s - self._moved_s[rank] > self._timeout_s * (SLOW_FACTOR if beat.slow else 1)
        ]

    def name_of(self, rank: int) -> str:
        """Rank, host and process where they are known."""
        return self._beats[rank].name if rank in self._beats else f"rank {rank}"

    def has_left(self, rank: int) -> bool:
        """Whether it said that it is done."""
        return rank in self._beats and self._beats[rank].ending == "left"

    def _running(self) -> dict[int, Beat]:
        return {rank: beat for rank, beat in sorted(self._beats.items()) if not beat.ending}

    def _failed(self, but: int) -> list[str]:
        return [
            f"{beat.name}: failed in {beat.place}: {beat.reason}"
            for rank, beat in sorted(self._beats.items())
            if beat.ending == "failed" and rank != but
        ]

    def _is_quiet(self, rank: int, now_s: float) -> bool:
        return now_s - self._alive_s[rank] > QUIET_BEATS * self._interval_s


def moved(beat: Beat, *, step: int, phase: Phase, slow: bool) -> Beat:
    """The beat of a rank whose main thread has got somewhere."""
    return replace(beat, step=step, phase=phase, slow=slow, moves=beat.moves + 1)
