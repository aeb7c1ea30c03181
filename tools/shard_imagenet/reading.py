"""The bytes of an entry, from whatever holds it. One `SourceReader` per process; its threads may share it."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from crisp.shard_imagenet.listing import Container, Entry
from crisp.shard_imagenet.parquet_rows import ParquetRows

_OPEN_TARS = 64


class SourceReader:
    """Reads entries of a listing.

    Args:
        containers: of the listing.
    """

    def __init__(self, containers: Sequence[Container]) -> None:
        self._containers = containers
        self._tars: OrderedDict[int, int] = OrderedDict()  # descriptors by container, the oldest first
        self._parquet: ParquetRows | None = None
        self._parquet_container = -1
        self._lock = threading.Lock()

    def read(self, entry: Entry) -> bytes | None:
        """All bytes of a file; None for a Parquet row without any.

        Raises:
            OSError: it cannot be read, or is not as long as it was when it was listed.
        """
        container = self._containers[entry.container]
        if container.kind == "parquet":
            return self._read_row(entry)
        if container.kind == "tar":
            if (path := container.location.local) is not None:
                return self._read_tar(entry, path)
            return container.location.read(entry.offset, entry.size)
        location = container.location / entry.name
        data = location.read() if location.protocol else _read_file(location.url)
        if len(data) != entry.size:
            reason = f"{len(data)} bytes, but {entry.size} when it was listed: it was changed"
            raise OSError(5, reason, str(location))
        return data

    def head(self, entry: Entry, size: int) -> bytes:
        """The first bytes of a file that may be too large to be worth reading whole.

        Raises:
            OSError: as `read`.
        """
        container = self._containers[entry.container]
        if container.kind == "parquet":  # where `entry.size` is a mean
            return (self._read_row(entry) or b"")[:size]
        size = min(size, entry.size)
        if container.kind == "folder":
            return (container.location / entry.name).read(0, size)
        return container.location.read(entry.offset, size)

    def close(self) -> None:
        """Close the files that are open."""
        with self._lock:
            for descriptor in self._tars.values():
                os.close(descriptor)
            self._tars.clear()
            self._parquet = None
            self._parquet_container = -1

    def _read_tar(self, entry: Entry, path: Path) -> bytes:
        # Under the lock, so that no other thread closes the descriptor meanwhile; the bytes come from the page cache
        # or the disk, either of which serves one reader as fast as two.
        with self._lock:
            descriptor = self._tars.get(entry.container)
            if descriptor is None:
                descriptor = self._tars[entry.container] = os.open(path, os.O_RDONLY)
                if len(self._tars) > _OPEN_TARS:
                    os.close(self._tars.popitem(last=False)[1])
            parts: list[bytes] = []
            done = 0
            while done < entry.size and (part := os.pread(descriptor, entry.size - done, entry.offset + done)):
                parts.append(part)  # one is all, but for a member of more than 2 GiB
                done += len(part)
        if done != entry.size:
            raise OSError(5, f"ends within {entry.name}: it was cut short", str(path))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_row(self, entry: Entry) -> bytes | None:
        with self._lock:
            if self._parquet is None or self._parquet_container != entry.container:
                self._parquet = ParquetRows(self._containers[entry.container].location)
                self._parquet_container = entry.container
            return self._parquet.read(entry.offset)


def _read_file(path: str) -> bytes:
    """A local file in as few calls as can be: there are a million of them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        data = os.read(descriptor, size)
        while len(data) < size and (part := os.read(descriptor, size - len(data))):
            data += part
        return data
    except OSError as error:  # what `os.read` raises names no file
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(descriptor)
