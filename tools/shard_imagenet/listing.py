"""What a source holds, as a table in files: 36 bytes and a name for each file, whatever their number.

A source writes one (`ListingWriter`), everything after reads it (`Listing`). The table is memory-mapped, so a
hundred million files need disk, not memory.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crisp.storage import Location

_ROW = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u8"),
        ("name_at", "<u8"),
        ("name_length", "<u4"),
        ("label", "<i4"),
        ("container", "<u4"),
    ]
)
_CHUNK = 65536


class Entry(NamedTuple):
    """One file that may become a sample."""

    number: int
    """Position in the source; the sample's key, so a key does not depend on what happens to other files"""
    name: str
    """Path within the source, with '/'"""
    label: int
    """−1: none"""
    container: int
    """Which of the listing's containers holds it"""
    offset: int
    """Where it begins in a tar; its row in a Parquet file; 0 in a folder"""
    size: int
    """Bytes when it was listed; in a Parquet file the mean of its row group"""


class Rejection(NamedTuple):
    """Something in the source that does not become a sample."""

    source: str
    """Path within the source, with '/'"""
    reason: str
    """'kind' or 'kind: detail'; rejections are counted by kind"""

    @property
    def kind(self) -> str:
        """The reason without its detail."""
        return self.reason.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Container:
    """What entries are read from."""

    kind: Literal["folder", "tar", "parquet"]
    location: Location
    """Of a folder, the one that names of entries are relative to"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The files of one split of a source, numbered 0 … len − 1; everything else in it is in `rejections`."""

    split: str
    """'train' or 'val'; '' if the source has only one"""
    layout: str
    """What kind of source it is, for people"""
    containers: tuple[Container, ...]
    classes: tuple[str, ...]
    """Class ids by label (WordNet ids where the source has them); empty without labels"""
    rejections: tuple[Rejection, ...]
    by_class: bool
    """Files of one class lie together, so that shards in this order would hold one class each"""
    rows: NDArray[np.void]
    names: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.rows)

    def entries(self, numbers: NDArray[np.int64]) -> list[Entry]:
        """The entries with these numbers."""
        rows = self.rows[numbers]
        # Their names may lie anywhere in the file; as ints, or each slice would be a NumPy scalar's.
        at, length = rows["name_at"].tolist(), rows["name_length"].tolist()
        names = [os.fsdecode(self.names[a : a + n].tobytes()) for a, n in zip(at, length, strict=True)]
        columns = (rows[name].tolist() for name in ("label", "container", "offset", "size"))
        return [Entry(*values) for values in zip(numbers.tolist(), names, *columns, strict=True)]

    def fingerprint(self) -> str:
        """SHA-256 over all of it: names, labels, sizes, places, rejections."""
        digest = hashlib.sha256(repr((self.classes, [c.kind for c in self.containers])).encode())
        digest.update("\n".join(f"{r.source}\t{r.reason}" for r in self.rejections).encode(errors="surrogateescape"))
        for array in (self.rows, self.names):
            for start in range(0, len(array), _CHUNK * 16):
                digest.update(np.ascontiguousarray(array[start : start + _CHUNK * 16]).tobytes())
        return digest.hexdigest()


class ClassIds:
    """Numbers for class names as they turn up, and later their places among the sorted names."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._ids: dict[str, int] = {}
        for name in names:
            self.add(name)

    def add(self, name: str) -> int:
        """The name's number for now."""
        return self._ids.setdefault(name, len(self._ids))

    def sorted(self) -> tuple[tuple[str, ...], NDArray[np.int32]]:
        """The names sorted, and for each number given out its place among them, with −1 for −1 at the end."""
        names = tuple(sorted(self._ids))
        place = {name: i for i, name in enumerate(names)}
        return names, np.array([*(place[name] for name in self._ids), -1], np.int32)


class ListingWriter:
    """Takes the files of a source one by one, in the order in which they get their numbers.

    Args:
        folder: a local folder for the table; once the listing is made, its files may lose their names.
        split: see `Listing`.
    """

    def __init__(self, folder: Path, *, split: str = "") -> None:
        self._split = split
        self._paths = (folder / f"files-{split}.rows", folder / f"files-{split}.names")
        for path in self._paths:
            path.write_bytes(b"")
        self._waiting: list[tuple[int, ...]] = []
        self._waiting_names: list[bytes] = []
        self._names_end = 0
        self._files = 0
        self.containers: list[Container] = []
        self.rejections: list[Rejection] = []

    def __len__(self) -> int:
        return self._files

    def add_container(self, kind: Literal["folder", "tar", "parquet"], location: Location) -> int:
        """Its number, for `add`."""
        self.containers.append(Container(kind, location))
        return len(self.containers) - 1

    def add(self, name: str, *, label: int, container: int, offset: int = 0, size: int) -> None:
        """One file; see `Entry`."""
        encoded = os.fsencode(name)
        self._waiting_names.append(encoded)
        self._waiting.append((offset, size, self._names_end, len(encoded), label, container))
        self._names_end += len(encoded)
        self._files += 1
        if len(self._waiting) == _CHUNK:
            self._flush()

    def reject(self, name: str, reason: str) -> None:
        """Something that is no sample; see `Rejection`."""
        self.rejections.append(Rejection(name, reason))

    def finish(
        self,
        *,
        layout: str,
        classes: tuple[str, ...],
        by_class: bool,
        label_of: NDArray[np.int32] | None = None,
    ) -> Listing:
        """The listing; labels given so far are replaced by `label_of[label]` if given (`ClassIds.sorted`)."""
        self._flush()
        rows = _mapped(self._paths[0], _ROW)
        if label_of is not None:
            for start in range(0, len(rows), _CHUNK):
                part = rows[start : start + _CHUNK]["label"]
                part[:] = label_of[part]
        return Listing(
            split=self._split,
            layout=layout,
            containers=tuple(self.containers),
            classes=classes,
            rejections=tuple(self.rejections),
            by_class=by_class,
            rows=rows,
            names=_mapped(self._paths[1], np.dtype(np.uint8)),
        )

    def _flush(self) -> None:
        # Opened for this only: whoever gives up on a source need not close anything.
        parts = np.array(self._waiting, _ROW).tobytes(), b"".join(self._waiting_names)
        for path, data in zip(self._paths, parts, strict=True):
            with path.open("ab") as stream:
                stream.write(data)
        self._waiting.clear()
        self._waiting_names.clear()


def _mapped(path: Path, dtype: np.dtype) -> NDArray:
    if path.stat().st_size == 0:  # mmap takes no empty file
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r+"))
