"""The files of one entry of the feature store; `crisp.evals.store` says what each is."""

import errno
import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError

KEY_FILE = "key.json"
LOCK_FILE = "lock"

Span = tuple[int, int]
"""The first item, and one past the last"""
Write = Callable[[int, Mapping[str, NDArray[Any]]], None]
"""The first item and the chunk of each field"""


@dataclass(frozen=True, slots=True)
class Field:
    """One array: an item's shape, and the type of its values."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    """As NumPy writes it; no objects"""


@dataclass(frozen=True, slots=True)
class Done:
    """A chunk that is whole."""

    start: int
    stop: int
    crcs: tuple[int, ...]
    """In the order of the fields"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The folder of one key. All methods raise CrispError for what the disk does."""

    folder: Path
    text: str
    """What key.json holds"""
    count: int
    fields: dict[str, Field]

    def exists(self) -> bool:
        """It has been made, whole or not; key.json is written last."""
        return (self.folder / KEY_FILE).is_file()

    def create(self) -> None:
        """Make the files at full size, with their bytes reserved: a disk that is too small is known now."""
        with self._plainly():
            for stale in self.folder.glob("done-*.txt"):
                stale.unlink()
            bytes_ = sum(self.count * _item_bytes(field) for field in self.fields.values())
            free = shutil.disk_usage(self.folder).free
            if bytes_ > free:
                raise CrispError(
                    f"{self.folder}: needs {_readable(bytes_)} for features, {_readable(free)} are free there; "
                    f"make room, or give another folder with --cache"
                )
            for name, field in self.fields.items():
                path = self.folder / f"{name}.npy"
                np.lib.format.open_memmap(path, "w+", np.dtype(field.dtype), (self.count, *field.shape))
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
                    os.fsync(file.fileno())
            partial = self.folder / f".{KEY_FILE}.partial"
            partial.write_text(self.text)
            partial.rename(self.folder / KEY_FILE)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from computing the same; the system frees the lock of a process that is gone."""
        with self._plainly():
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK_FILE).open("w")
        with file:
            try:
                with self._plainly():
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CrispError(
                    f"{self.folder}: another process is computing these features; wait until it is done, or give "
                    f"another folder with --cache"
                ) from None
            yield

    def check(self) -> None:
        """Raise CrispError unless this process sees the files that were made for the key."""
        with self._plainly():
            if not self.exists():
                raise CrispError(
                    f"{self.folder}: not seen by every rank; give a --cache on a file system that all nodes share"
                )
            if (self.folder / KEY_FILE).read_text() != self.text:
                raise self._damaged(f"{KEY_FILE} describes other features")
            self.open()

    def open(self) -> dict[str, NDArray[Any]]:
        """Each field as a read-only memory map."""
        arrays = {}
        for name, field in self.fields.items():
            try:
                array = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise self._damaged(f"{name}.npy cannot be read ({error})") from error
            if array.shape != (self.count, *field.shape) or array.dtype != np.dtype(field.dtype):
                raise self._damaged(f"{name}.npy holds {array.dtype} {list(array.shape)}")
            arrays[name] = array
        return arrays

    def done(self) -> list[Done]:
        """The chunks that are whole, in order; a line that was cut off by a crash is none."""
        found = []
        with self._plainly():
            for path in sorted(self.folder.glob("done-*.txt")):
                text = path.read_bytes()
                for line in text[: text.rfind(b"\n") + 1].splitlines():
                    if not re.fullmatch(rb"\d+ \d+" + rb" \d+" * len(self.fields), line):
                        raise self._damaged(f"{path.name} holds {line[:40]!r}")
                    start, stop, *crcs = map(int, line.split())
                    found.append(Done(start, stop, tuple(crcs)))
        found.sort(key=lambda done: done.start)
        place = 0
        for done in found:
            if not place <= done.start < done.stop <= self.count:
                raise self._damaged(f"its chunks overlap or leave its {self.count} items at {done.start}–{done.stop}")
            place = done.stop
        return found

    def verify(self, chunks: Sequence[Done]) -> None:
        """Read these chunks; raise CrispError if a byte differs from what was written."""
        arrays = self.open()
        for done in chunks:
            for (name, array), crc in zip(arrays.items(), done.crcs, strict=True):
                if zlib.crc32(array[done.start : done.stop].data) != crc:
                    raise self._damaged(f"{name}.npy is not as it was written in items {done.start}–{done.stop - 1}")

    @contextmanager
    def writer(self, rank: int) -> Iterator[Write]:
        """A function that stores a chunk, and then says that it is whole."""
        arrays = self.open()
        offsets = {name: array.offset for name, array in arrays.items()}  # type: ignore[attr-defined]
        with self._plainly():
            files = {name: (self.folder / f"{name}.npy").open("r+b", buffering=0) for name in self.fields}
            marks = (self.folder / f"done-{rank}.txt").open("a+b", buffering=0)
            marks.seek(0)
            marks.truncate(marks.read().rfind(b"\n") + 1)  # a line that a crash cut off

        def write(start: int, chunk: Mapping[str, NDArray[Any]]) -> None:
            with self._plainly():
                crcs = []
                for name, field in self.fields.items():
                    data = chunk[name].reshape(-1).view(np.uint8)
                    _write_all(files[name].fileno(), data, offsets[name] + start * _item_bytes(field))
                    os.fsync(files[name].fileno())
                    crcs.append(zlib.crc32(data.data))
                stop = start + len(chunk[name])
                marks.write(f"{start} {stop} {' '.join(map(str, crcs))}\n".encode())
                os.fsync(marks.fileno())

        try:
            yield write
        finally:
            for file in (*files.values(), marks):
                file.close()

    def _damaged(self, what: str) -> CrispError:
        return CrispError(f"{self.folder}: damaged: {what}; remove this folder, the features are computed again")

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see that it can be written"
            raise CrispError(
                f"{self.folder}: {error.strerror or error}; {remedy}, or give another folder with --cache (what is "
                f"stored is kept)"
            ) from error


def key_text(key: Mapping[str, Any], count: int, fields: Mapping[str, Field]) -> str:
    """What identifies an entry, as JSON of one form."""
    described = {name: {"shape": list(field.shape), "dtype": field.dtype} for name, field in fields.items()}
    whole = {"key": key, "count": count, "fields": described}
    return json.dumps(whole, sort_keys=True, allow_nan=False, indent=2) + "\n"


def _item_bytes(field: Field) -> int:
    return int(np.prod(field.shape, dtype=np.int64)) * np.dtype(field.dtype).itemsize


def _write_all(file: int, data: NDArray[np.uint8], offset: int) -> None:
    """The system writes at most 2 GiB at a time, and less where a signal comes in between."""
    rest = data.data
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def _readable(bytes_: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= size:
            return f"{bytes_ / size:.1f} {unit}"
    return f"{bytes_} B"
