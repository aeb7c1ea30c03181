"""Random access to the images of a folder of shards, local or remote, from many threads."""

import contextlib
import logging
import os
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crisp.pipelines.faults import SampleError
from crisp.pipelines.shard_cache import ShardCache
from crisp.shard_format import Manifest, open_shards

log = logging.getLogger(__name__)

_OPEN = 256  # 1024 descriptors are a common limit; shards are read in windows far smaller than this
_REMEDY = "restore it, or remove it and run the 'crisp shard' that made the folder again: only that shard is made again"


class ShardSet:
    """A folder of shards, read by sample id (the row of its index).

    Opening reads the manifest and the fingerprint's rows of the index; tars are opened when first read. Methods may
    be called from any number of threads. Pickling carries the path: the other process opens (and checks) the folder
    itself. Reads are positional (`pread`), not from a memory map: of a tar that is cut short, or on a disk that fails,
    a map kills the process (SIGBUS), a read tells.

    Args:
        folder: written by `crisp shard`; with `cache`, left out.
        verify: compare each sample's bytes with the checksum in the index when it is read (about 16 µs for 110 kB,
            without the interpreter lock).
        cache: of a remote folder.

    Raises:
        CrispError: as `crisp.shard_format.open_shards`.
    """

    def __init__(self, folder: Path | None = None, *, verify: bool = True, cache: ShardCache | None = None) -> None:
        assert (folder is None) != (cache is None), "one of the two"
        self.verify, self.cache = verify, cache
        self.folder = cache.metadata if cache else Path(folder).resolve()  # type: ignore[arg-type]
        self.manifest: Manifest
        self.index: NDArray[np.void]
        self.manifest, self.index = open_shards(self.folder)
        # Columns as plain arrays on the same memory: np.memmap is several times slower to take a number from.
        rows = np.asarray(self.index)
        self._shard, self._offset = rows["shard"], rows["offset"]
        self._length, self._checksum = rows["length"], rows["checksum"]
        self._tars: dict[int, _Tar] = {}
        self._opening = threading.Lock()

    def __len__(self) -> int:
        return len(self._shard)

    def damaged_sizes(self) -> list[tuple[int, str]]:
        """Local tars that are missing or of another size than the manifest says: (shard, what is wrong); 2 µs each."""
        damaged = []
        for shard, info in enumerate(self.manifest.shards if self.cache is None else ()):
            path = self.folder / info.name
            try:
                size = os.stat(path).st_size
            except OSError as error:
                damaged.append((shard, f"{path}: {error.strerror}; {_REMEDY}"))
                continue
            if size != info.bytes:
                damaged.append((shard, f"{path}: {size} bytes, the manifest says {info.bytes}; {_REMEDY}"))
        return damaged

    def read(self, sample_id: int, into: memoryview | None = None, *, check: bool = True) -> memoryview:
        """The image file's bytes.

        Args:
            sample_id: the row of the index.
            into: memory for them, of the length that the index has.
            check: compare them with the checksum, where the set verifies; else `check` is to be called.

        Raises:
            IndexError: no such sample.
            SampleError: the bytes are not those the index describes, or the tar cannot be had.
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id}: {self.folder} has {len(self)}")
        shard, offset, length = int(self._shard[sample_id]), int(self._offset[sample_id]), int(self._length[sample_id])
        tar = self._tars.get(shard) or self._open(shard)
        try:
            if into is None:
                data = memoryview(os.pread(tar.descriptor, length, offset))
            else:
                data = into[: os.preadv(tar.descriptor, [into], offset)].toreadonly()
        except OSError as error:
            reason = f"{error.strerror} at {offset}"
            raise SampleError("bytes", reason, where=self._name(shard), remedy=_REMEDY) from error
        if len(data) != length or tar.suspect:
            self._compare(sample_id, data)
        elif check:
            self.check(sample_id, data)
        return data

    def check(self, sample_id: int, data: memoryview) -> None:
        """Compare a sample's bytes with its checksum, if this set verifies.

        Raises:
            SampleError: they differ.
        """
        if self.verify:
            self._compare(sample_id, data)

    def _compare(self, sample_id: int, data: memoryview) -> None:
        if zlib.crc32(data) != self._checksum[sample_id]:
            shard, offset = self.shard_of(sample_id), int(self._offset[sample_id])
            reason = f"the bytes of sample {sample_id} (at {offset}) are not those that were indexed"
            raise SampleError("bytes", reason, where=self._name(shard), remedy=_REMEDY)

    def lengths(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of images, [B] → [B]."""
        return self._length[sample_ids].astype(np.int64)

    def shard_of(self, sample_id: int) -> int:
        """Which shard holds a sample."""
        return int(self._shard[sample_id])

    def key(self, sample_id: int) -> str:
        """The sample's key in its tar, for messages; '' where the tar's header cannot be read."""
        shard, offset = self.shard_of(sample_id), int(self._offset[sample_id])
        try:
            tar = self._tars.get(shard) or self._open(shard)
            header = os.pread(tar.descriptor, tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, SampleError, tarfile.HeaderError):
            return ""
        folder, _, file = name.rpartition("/")
        return f"{folder}/{file.split('.')[0]}" if folder else file.split(".")[0]

    def close_others(self, shards: Iterable[int]) -> None:
        """Close the tars that are not among these: of a removed file, the disk space is free only then."""
        for shard in self.opened - frozenset(shards):
            self._tars.pop(shard, None)

    @property
    def opened(self) -> frozenset[int]:
        """The shards that are open now."""
        return frozenset(self._tars)

    def _name(self, shard: int) -> str:
        name = self.manifest.shards[shard].name
        return f"{self.cache.url}/{name}" if self.cache else str(self.folder / name)

    def _open(self, shard: int) -> "_Tar":
        try:
            # Outside the lock: a download must not hold up who reads another shard.
            found = self._fetch_and_open(shard)
            with self._opening:
                if (tar := self._tars.get(shard)) is not None:  # another thread was faster
                    return tar
                tar = found
                size, expected = os.fstat(tar.descriptor).st_size, self.manifest.shards[shard].bytes
                if size != expected:
                    tar.suspect = True
                    log.warning("%s: %d bytes, the manifest says %d; %s", self._name(shard), size, expected, _REMEDY)
                while len(self._tars) >= _OPEN:
                    del self._tars[next(iter(self._tars))]  # the oldest; a thread that reads it keeps it open
                self._tars[shard] = tar
                return tar
        except OSError as error:
            reason = error.strerror or str(error)
            raise SampleError("shard", reason, where=self._name(shard), remedy=_REMEDY) from error

    def _fetch_and_open(self, shard: int) -> "_Tar":
        if self.cache is None:
            return _Tar(self.folder / self.manifest.shards[shard].name)
        while True:
            path = self.cache.fetch(shard)
            with contextlib.suppress(FileNotFoundError):  # it had to make room for another one, just now
                return _Tar(path)

    def __reduce__(self) -> tuple[Callable[..., "ShardSet"], tuple[object, ...]]:
        return _reopen, (None if self.cache else self.folder, self.verify, self.cache)


class _Tar:
    """An open file, closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.suspect = False
        """Of another size than the manifest says: checksums are compared even where nobody asked for it"""

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _reopen(folder: Path | None, verify: bool, cache: ShardCache | None) -> ShardSet:
    return ShardSet(folder, verify=verify, cache=cache)
