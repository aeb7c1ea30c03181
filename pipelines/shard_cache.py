"""Local copies of a remote folder's shards: bounded, shared by all processes of a machine, checked when they arrive.

CACHE/NAME-DIGEST/  manifest.json  index.npy  shard-000000.tar …

The digest follows from the URL and the manifest, so a folder that changes at its URL gets another cache.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from crisp.errors import CrispError
from crisp.shard_format import INDEX_FILE, MANIFEST_FILE, ShardInfo, parse_manifest
from crisp.storage import Location

log = logging.getLogger(__name__)

_BLOCK_BYTES = 8 * 1024 * 1024  # a cut connection costs less than that
_REFUSED_S = 30.0  # a shard that cannot be had is not asked for again for each of its samples
_PARTIAL = ".partial"


def default_cache_folder() -> Path:
    """`crisp/shards` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crisp" / "shards"


class ShardCache:
    """The shards at a URL, as local files that come and go.

    A tar is downloaded when it is first asked for, by one process of the machine while the others wait, and compared
    with the manifest's checksum. The tars that were asked for longest ago make room for new ones.

    A partial file has its full length from the start, so that the sum of all lengths is what the downloads that are
    under way will need. It is locked while it is being written; what a killed process leaves is written anew.

    Args:
        url: of a folder written by `crisp shard`: http(s), s3, gs, or whatever else fsspec knows.
        folder: of all caches; default `default_cache_folder`.
        limit_bytes: that the tars in `folder` may have together, those of other data sets included.

    Raises:
        CrispError: no shards there, or they cannot be read.
    """

    def __init__(self, url: str, *, folder: Path | None = None, limit_bytes: int) -> None:
        top = (folder or default_cache_folder()).expanduser().resolve()
        remote = Location.of(url)
        try:
            manifest = (remote / MANIFEST_FILE).read()
        except FileNotFoundError as error:
            raise CrispError(f"{url}: no {MANIFEST_FILE}; name a folder of shards, written by 'crisp shard'") from error
        except OSError as error:
            raise CrispError(f"{url}: {error.strerror or error}; check the address and the network") from error
        digest = hashlib.sha256(remote.url.encode() + b"\n" + manifest).hexdigest()[:16]
        self._open(remote, top, limit_bytes, top / f"{remote.name}-{digest}", manifest)
        self._bring_metadata(manifest)
        log.info(
            "%s: shards are kept in %s (data.cache), %.3g GB in all (data.cache_gb), %d of %d are there",
            url, self.metadata, limit_bytes / 1e9, len(list(self.metadata.glob("*.tar"))), len(self._shards),
        )  # fmt: skip

    def _open(self, remote: Location, top: Path, limit_bytes: int, metadata: Path, manifest: bytes) -> None:
        self._remote, self._top = remote, top
        self.limit_bytes = limit_bytes
        self.metadata = metadata
        """Local folder with manifest and index, for `open_shards`"""
        self._shards = parse_manifest(manifest, f"{remote}/{MANIFEST_FILE}").shards
        self._refused: dict[int, tuple[float, str]] = {}
        self._counting = threading.Lock()
        self.bytes_fetched = 0
        """Of tars, by this process"""

    @property
    def url(self) -> str:
        """Of the remote folder."""
        return self._remote.url

    def fetch(self, shard: int) -> Path:
        """The local copy of a tar; downloads it, or waits for whoever does.

        It may be removed again, to make room, before the caller has opened it: then ask again.

        Raises:
            OSError: it cannot be had; for half a minute this is not tried again.
            CrispError: the cache is too small for it, or its disk is full.
        """
        path = self._path(shard)
        try:
            os.utime(path)  # asked for most recently: the last to go
            return path
        except FileNotFoundError:
            pass
        until_s, reason = self._refused.get(shard, (0.0, ""))
        if time.monotonic() < until_s:
            raise OSError(errno.EIO, reason, str(path))
        try:
            self._download(shard, path)
        except OSError as error:
            reason = error.strerror or str(error)
            self._refused[shard] = time.monotonic() + _REFUSED_S, reason
            raise OSError(error.errno or errno.EIO, reason, f"{self._remote}/{path.name}") from error
        return path

    def touch(self, shard: int) -> bool:
        """Count a tar as asked for just now, without bringing it; whether it is there."""
        try:
            os.utime(self._path(shard))
        except FileNotFoundError:
            return False
        return True

    def shard_bytes(self, shard: int) -> int:
        """Size of a tar."""
        return self._shards[shard].bytes

    def _path(self, shard: int) -> Path:
        return self.metadata / self._shards[shard].name

    def _bring_metadata(self, manifest: bytes) -> None:
        """The manifest comes last: where it is, the index is whole."""
        path = self.metadata / MANIFEST_FILE
        if path.exists():
            return
        try:
            self.metadata.mkdir(parents=True, exist_ok=True)
            with _locked(self.metadata / f".{INDEX_FILE}{_PARTIAL}") as partial:
                if path.exists():  # another process was faster
                    return
                with (self._remote / INDEX_FILE).open() as remote, partial.open("r+b") as local:
                    local.truncate()
                    while block := remote.read(_BLOCK_BYTES):
                        local.write(block)
                partial.replace(self.metadata / INDEX_FILE)
                with Location.of(path).whole_file() as file:
                    file.write(manifest)
        except OSError as error:
            raise CrispError(f"{self._remote}: its index cannot be brought to {self.metadata} ({error})") from error

    def _download(self, shard: int, path: Path) -> None:
        info = self._shards[shard]
        with _locked(path.with_name(path.name + _PARTIAL)) as partial:
            if path.exists():  # somebody else has brought it meanwhile
                partial.unlink(missing_ok=True)
                return
            self._make_room(partial, info)
            try:
                for last_try in (False, True):
                    if self._bring(info, partial) == info.checksum:
                        break
                    if last_try:
                        raise OSError(errno.EIO, "its checksum is not the manifest's", str(path))
                    log.warning("%s/%s: its checksum is not the manifest's; once more", self._remote, info.name)
                partial.replace(path)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise CrispError(
                        f"{path}: no space left; make room, lower --data.cache-gb, or name another disk with "
                        f"--data.cache"
                    ) from error
                raise
            finally:
                if not path.exists():  # once it has been renamed, a file of this name is another process's
                    partial.unlink(missing_ok=True)

    def _bring(self, info: ShardInfo, partial: Path) -> int:
        """Its checksum."""
        checksum, remote = 0, self._remote / info.name
        with partial.open("r+b", buffering=0) as file:
            for offset in range(0, info.bytes, _BLOCK_BYTES):
                block = remote.read(offset, min(_BLOCK_BYTES, info.bytes - offset))
                with self._counting:
                    self.bytes_fetched += len(block)
                checksum = zlib.crc32(block, checksum)
                view = memoryview(block)
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())  # or a crash may leave a file of zeros under the tar's name
        return checksum

    def _make_room(self, partial: Path, info: ShardInfo) -> None:
        """Give `partial` its length, after removing the tars that were asked for longest ago, if it must be.

        Raises:
            CrispError: the limit is too small.
        """
        if info.bytes > self.limit_bytes:
            raise CrispError(
                f"data.cache_gb={self.limit_bytes / 1e9:g}: too small for {info.name} ({info.bytes / 1e9:.3g} GB); "
                f"raise --data.cache-gb"
            )
        os.truncate(partial, 0)  # what a killed process left
        while True:
            with _locked(self._top / ".lock", keep=True):
                tars, taken = [], 0
                for file in self._top.glob("*/*.tar*"):
                    with contextlib.suppress(FileNotFoundError):
                        if file.suffix == _PARTIAL and _is_abandoned(file):
                            file.unlink()
                            continue
                        status = file.stat()
                        taken += status.st_size
                        if file.suffix == ".tar":
                            tars.append((status.st_mtime_ns, file, status.st_size))
                for _, file, size in sorted(tars):
                    if taken + info.bytes <= self.limit_bytes:
                        break
                    file.unlink(missing_ok=True)  # whoever has it open reads on
                    taken -= size
                if taken + info.bytes <= self.limit_bytes:
                    os.truncate(partial, info.bytes)
                    return
            time.sleep(0.1)  # all the room is needed by downloads under way; they will soon be tars that can go

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._remote, self._top, self.limit_bytes, self.metadata)


def _reopen(remote: Location, top: Path, limit_bytes: int, metadata: Path) -> ShardCache:
    """In another process of the same machine: what is in the cache is enough."""
    cache = ShardCache.__new__(ShardCache)
    cache._open(remote, top, limit_bytes, metadata, (metadata / MANIFEST_FILE).read_bytes())
    return cache


@contextlib.contextmanager
def _locked(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """The file, made if need be, locked against other threads and processes; the kernel unlocks it for the dead.

    Args:
        path: of the file.
        keep: it is never removed or renamed, so that whoever has it locked has the one at `path`.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if keep or _is_at(path, descriptor):
                yield path
                return
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that lies there now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_abandoned(partial: Path) -> bool:
    """Whether nobody is writing it."""
    descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
