"""Random access to the images of a folder of shards, from many threads, without copying."""

import mmap
import os
import threading
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.shard_format import Manifest, open_shards

# A map holds a file descriptor, and 1024 of them is a common limit; shards are read in windows far smaller than this.
_MAPS = 256
_REMEDY = "restore it, or remove it and run the 'crisp shard' that made the folder again: only that shard is made again"


class ShardSet:
    """A folder of shards, read by sample id (the row of its index).

    Opening reads the manifest and the fingerprint's rows of the index; tars are mapped, and their sizes checked, when
    first read, or all at once by `check_sizes`. Methods may be called from any number of threads. Pickling carries the
    path: the other process opens (and checks) the folder itself.

    A tar that is cut short while it is mapped kills the process that touches the lost part (SIGBUS): write a new
    folder of shards, never over one in use.

    Args:
        folder: written by `crisp shard`.
        verify: compare each sample's bytes with the checksum in the index when it is read (about 40 µs for 110 kB,
            without the interpreter lock, and it pulls the bytes into memory before the decoder needs them).

    Raises:
        CrispError: as `crisp.shard_format.open_shards`.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder.resolve()
        self.verify = verify
        self.manifest: Manifest
        self.index: NDArray[np.void]
        self.manifest, self.index = open_shards(self.folder)
        # Columns as plain arrays on the same memory: np.memmap is several times slower to take a number from.
        rows = np.asarray(self.index)
        self._shard, self._offset = rows["shard"], rows["offset"]
        self._length, self._checksum = rows["length"], rows["checksum"]
        self._maps: dict[int, memoryview] = {}
        self._mapping = threading.Lock()

    def __len__(self) -> int:
        return len(self._shard)

    def check_sizes(self) -> None:
        """Look at the size of every tar, about 2 µs each on a local disk: for whoever is about to read for hours.

        Raises:
            CrispError: a tar is missing, or not as long as the manifest says.
        """
        for info in self.manifest.shards:
            path = self.folder / info.name
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise CrispError(f"{path}: {error.strerror}; {_REMEDY}") from error
            if size != info.bytes:
                raise CrispError(f"{path}: {size} bytes, the manifest says {info.bytes}; {_REMEDY}")

    def read(self, sample_id: int) -> memoryview:
        """The image file's bytes, a read-only view into the mapped tar; it stays valid as long as it is held.

        Raises:
            IndexError: no such sample.
            CrispError: the bytes are not those the index describes, or the tar is gone or has another size.
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id}: {self.folder} has {len(self)}")
        shard = int(self._shard[sample_id])
        tar = self._maps.get(shard)
        if tar is None:
            tar = self._map(shard)
        offset, length = int(self._offset[sample_id]), int(self._length[sample_id])
        data = tar[offset : offset + length]
        if len(data) != length or (self.verify and zlib.crc32(data) != self._checksum[sample_id]):
            raise CrispError(
                f"{self.folder / self.manifest.shards[shard].name}: the bytes of sample {sample_id} (at {offset}) are "
                f"not those that were indexed; the shard is damaged, {_REMEDY}"
            )
        return data

    def _map(self, shard: int) -> memoryview:
        with self._mapping:
            if (tar := self._maps.get(shard)) is not None:  # another thread was faster
                return tar
            info = self.manifest.shards[shard]
            path = self.folder / info.name
            try:
                with path.open("rb") as file:
                    tar = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError) as error:  # ValueError: an empty file
                raise CrispError(f"{path}: {error}; {_REMEDY}") from error
            if len(tar) != info.bytes:
                raise CrispError(f"{path}: {len(tar)} bytes, the manifest says {info.bytes}; {_REMEDY}")
            if len(self._maps) >= _MAPS:
                del self._maps[next(iter(self._maps))]  # the oldest; views of it that are still held keep it alive
            self._maps[shard] = tar
            return tar

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.folder, self.verify)


def _reopen(folder: Path, verify: bool) -> ShardSet:
    return ShardSet(folder, verify=verify)
