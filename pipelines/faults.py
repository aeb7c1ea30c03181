"""Samples that cannot be shown, their neighbours, and the log from which a resumed run repeats what it did.

RUN/faults/rank-00000.jsonl holds a line for each replacement, written and synced before the neighbour is used. Whoever
shows the same step again, on other ranks or with the other renderer, reads all of these files first.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]

Kind = Literal["shard", "bytes", "decode", "render", "timeout"]
"""What failed: the whole shard cannot be had; the sample's bytes are not those of the index; they are no image that
can be decoded; the renderer failed at it; it took too long."""

_TRIED_AGAIN = ("shard", "bytes")  # storage may come back; what breaks or stalls a decoder would do so each epoch
_TRIES_PER_SHARD, _SHARDS = 8, 8
_FEW = 16  # so that small data sets survive a damaged file or two


class SampleError(CrispError):
    """A sample cannot be shown.

    Args:
        kind: what failed.
        reason: why.
        where: the file, for a message that stands alone.
        remedy: likewise.
    """

    def __init__(self, kind: Kind, reason: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(": ".join(filter(None, (where, "; ".join(filter(None, (reason, remedy)))))))
        self.kind, self.reason = kind, reason


def not_replaced(sample: str, fault: SampleError) -> CrispError:
    """What a renderer raises that may not replace a sample."""
    return CrispError(f"{sample}: {fault}; shard the source again, 'crisp shard' leaves out what cannot be decoded")


def neighbours(sizes: Ints, first_rows: Ints, sample_id: int) -> Iterator[list[int]]:
    """Samples to show in place of one, in order, grouped by shard: those of a group share their storage.

    The next one in its shard, then seven more spread over that shard (of which a part may be lost); then eight in each
    of the next seven shards. So the choice follows from the data alone, and mostly reads a shard that is read anyway.

    Args:
        sizes: [S] samples in each shard.
        first_rows: [S] sample id of each shard's first sample.
        sample_id: the one that cannot be shown; it is not among them.
    """
    home = int(np.searchsorted(first_rows, sample_id, side="right")) - 1
    while sizes[home] == 0:  # empty shards share their first row with the next one
        home -= 1
    place = sample_id - int(first_rows[home])
    for hop in range(min(_SHARDS, len(sizes))):
        shard = (home + hop) % len(sizes)
        first, size = int(first_rows[shard]), int(sizes[shard])
        tries = min(_TRIES_PER_SHARD, size)
        group = [first + (place + 1 + i * size // tries) % size for i in range(tries)]
        yield [candidate for candidate in group if candidate != sample_id]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replacement:
    """A line of the log."""

    step: int
    """Global step"""
    epoch: int
    asked_id: int
    """Sample that the order asks for"""
    shown_id: int
    """Its neighbour that is shown"""
    failed_id: int
    """Sample that failed: the one asked for, or a neighbour that was to be shown in its place"""
    kind: Kind
    shard: str
    """Tar of the sample that failed"""
    key: str
    """Its key there, as far as that can be read"""
    reason: str


class FaultLog:
    """The replacements of a run. Thread-safe; several processes may write the same file.

    Args:
        folder: of the run's fault logs; made when there is something to write.
        name: of the file that this process writes.
        samples: N, of the data set.
        max_bad_share: more distinct samples than this share of N, and more than 16, end the run.
    """

    def __init__(self, folder: Path, *, name: str, samples: int, max_bad_share: float) -> None:
        self.folder = folder
        self._name, self._samples, self._max_bad_share = name, samples, max_bad_share
        # For each sample that an epoch's order asks for: what failed, and what was shown then. A chain, so that it does
        # not matter in which order the files of several ranks are read.
        self._instead: dict[tuple[int, int], dict[int, int]] = {}
        self._unusable: dict[int, Kind] = {}
        self._bad: set[int] = set()
        self._read_bytes: dict[str, int] = {}
        self._lock = threading.RLock()
        self.replaced = 0
        """Replacements in this process's file since it began, whoever of the rank wrote them"""
        self.refresh()
        self.replaced = 0  # those were of earlier processes
        if self._bad:
            log.info("%s: %d samples were replaced before, their neighbours are shown again", folder, len(self._bad))

    def shown(self, epoch: int, sample_id: int) -> int:
        """The sample to show where the order asks for `sample_id`: itself, unless it was replaced."""
        chain = self._instead.get((epoch, sample_id))
        while chain and sample_id in chain:
            sample_id = chain[sample_id]
        return sample_id

    def failed(self, epoch: int, sample_id: int) -> frozenset[int]:
        """Samples that could not be shown where the order asks for `sample_id`."""
        return frozenset(self._instead.get((epoch, sample_id), ()))

    def unusable(self, sample_id: int) -> Kind | None:
        """Why a sample is not even tried, in any epoch."""
        return self._unusable.get(sample_id)

    def add(self, replacement: Replacement) -> None:
        """Write a line; when it returns the line is on the disk.

        Raises:
            CrispError: too many bad samples, or the log cannot be written.
        """
        with self._lock:
            first = replacement.failed_id not in self._bad
            try:
                self._append(json.dumps(asdict(replacement)) + "\n")
            except OSError as error:
                raise CrispError(
                    f"{self.folder}: the fault log cannot be written ({error.strerror}); make room or choose another "
                    f"folder with --out, then resume"
                ) from error
            self.refresh()
        if first:
            log.warning(
                "%s, sample %d (%s): %s; sample %d is shown in its place",
                replacement.shard, replacement.failed_id, replacement.key, replacement.reason, replacement.shown_id,
            )  # fmt: skip

    def check(self) -> None:
        """Stop at too many.

        Raises:
            CrispError: more bad samples than `max_bad_share` allows.
        """
        bad = len(self._bad)
        if bad > max(_FEW, self._max_bad_share * self._samples):
            raise CrispError(
                f"{bad} of {self._samples} samples could not be shown, more than data.max_bad_share="
                f"{self._max_bad_share} allows; see {self.folder}, mend the shards ('crisp shard verify') and resume, "
                f"or raise --data.max-bad-share"
            )

    def refresh(self) -> None:
        """Take in what other processes have written."""
        with self._lock:
            try:
                files = sorted(entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".jsonl"))
            except FileNotFoundError:
                return
            for name in files:
                self._take_in(name)

    def _take_in(self, name: str) -> None:
        with (self.folder / name).open("rb") as file:
            file.seek(self._read_bytes.get(name, 0))
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a process that was killed may leave half a line
        self._read_bytes[name] = self._read_bytes.get(name, 0) + len(whole)
        for line in whole.splitlines():
            try:
                row = Replacement(**json.loads(line))
            except (ValueError, TypeError):
                log.warning("%s: not a line of a fault log, passed over: %.60r", self.folder / name, line)
                continue
            self._instead.setdefault((row.epoch, row.asked_id), {})[row.failed_id] = row.shown_id
            self._bad.add(row.failed_id)
            if row.kind not in _TRIED_AGAIN:
                self._unusable[row.failed_id] = row.kind
            self.replaced += name == self._name

    def _append(self, line: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self._name
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (b"\n" if torn else b"") + line.encode())  # one write: nothing comes in between
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.folder, self._name, self._samples, self._max_bad_share)


def _reopen(folder: Path, name: str, samples: int, max_bad_share: float) -> FaultLog:
    return FaultLog(folder, name=name, samples=samples, max_bad_share=max_bad_share)
