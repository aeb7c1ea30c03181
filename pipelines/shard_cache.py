"""Local copies of a remote folder's shards: bounded, shared by all processes of a machine, checked when they arrive.

CACHE/NAME-DIGEST/  manifest.json  index.npy  shard-000000.tar …  shard-000007.refused (why it could not be had)

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
from crisp.shard_format import INDEX_FILE, MANIFEST_FILE, ShardInfo, open_shards, parse_manifest
from crisp.storage import Location

log = logging.getLogger(__name__)

_BLOCK_BYTES = 8 * 1024 * 1024  # a cut connection costs less than that
_REFUSED_S = 30.0  # a shard that cannot be had is not asked for again for each of its samples
_PARTIAL, _REFUSED = ".partial", ".refused"


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
        for info in self._shards:  # a remote file says where to write here
            if info.name != os.path.basename(info.name) or not info.name.endswith(".tar"):
                raise CrispError(f"{remote}/{MANIFEST_FILE}: {info.name!r} is no name of a tar; shard the source again")
        self._opened_s = time.time()
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
            OSError: it cannot be had; for half a minute no process of the machine tries again.
            CrispError: the cache is too small for it, or cannot be written.
        """
        path = self._path(shard)
        if not self.touch(shard):
            self._raise_if_refused(shard)
            self._download(shard, path)
        return path

    def touch(self, shard: int) -> bool:
        """Count a tar as asked for just now, the last to go, without bringing it; whether it is there whole."""
        path = self._path(shard)
        try:
            _touch(path)
            return path.stat().st_size == self._shards[shard].bytes
        except FileNotFoundError:
            return False

    def _raise_if_refused(self, shard: int) -> None:
        """As whoever tried last, if that was a moment ago and after this process began: a new run tries for itself."""
        path = self._path(shard)
        try:
            when, _, reason = path.with_suffix(_REFUSED).read_text().partition(" ")
        except FileNotFoundError:
            return
        if reason and max(self._opened_s, time.time() - _REFUSED_S) < float(when):
            raise OSError(errno.EIO, reason, f"{self._remote}/{path.name}")

    def shard_bytes(self, shard: int) -> int:
        """Size of a tar."""
        return self._shards[shard].bytes

    def _path(self, shard: int) -> Path:
        return self.metadata / self._shards[shard].name

    def _bring_metadata(self, manifest: bytes) -> None:
        """The manifest comes last. A damaged copy is brought anew; one that arrives damaged is not kept."""
        if self._metadata_is_whole():
            return
        path = self.metadata / MANIFEST_FILE
        try:
            self.metadata.mkdir(parents=True, exist_ok=True)
            with _locked(self.metadata / f".{INDEX_FILE}{_PARTIAL}") as partial:
                if self._metadata_is_whole():  # another process was faster
                    return
                with (self._remote / INDEX_FILE).open() as remote, partial.open("r+b") as local:
                    local.truncate()
                    while block := remote.read(_BLOCK_BYTES):
                        local.write(block)
                    local.flush()
                    os.fsync(local.fileno())
                partial.replace(self.metadata / INDEX_FILE)
                with Location.of(path).whole_file() as file:
                    file.write(manifest)
                if not self._metadata_is_whole():
                    path.unlink()
                    raise CrispError(
                        f"{self._remote}/{INDEX_FILE}: what arrived is not the index that its manifest names; try "
                        f"again, or upload the folder anew"
                    )
        except OSError as error:
            raise CrispError(f"{self._remote}: its index cannot be brought to {self.metadata} ({error})") from error

    def _metadata_is_whole(self) -> bool:
        try:
            open_shards(self.metadata)
        except CrispError:
            return False
        return True

    def _download(self, shard: int, path: Path) -> None:
        info, renamed = self._shards[shard], False
        with _locked(path.with_name(path.name + _PARTIAL)) as partial:
            try:
                if self.touch(shard):  # somebody else has brought it meanwhile
                    return
                self._raise_if_refused(shard)  # or has tried
                self._make_room(partial, info)
                self._bring_checked(info, partial)
                # Under the lock of the whole cache: whoever adds up its files must not miss one between two names.
                with _locked(self._top / ".lock", keep=True), _on_disk(path):
                    _touch(partial)
                    partial.replace(path)
                    renamed = True
            except OSError as error:
                reason = " ".join((error.strerror or str(error)).split())
                with _on_disk(path):
                    path.with_suffix(_REFUSED).write_text(f"{time.time()} {reason}")
                raise OSError(error.errno or errno.EIO, reason, f"{self._remote}/{info.name}") from error
            finally:
                if not renamed:  # else a file of this name is another's
                    partial.unlink(missing_ok=True)

    def _bring_checked(self, info: ShardInfo, partial: Path) -> None:
        if self._bring(info, partial) == info.checksum:
            return
        log.warning("%s/%s: its checksum is not the manifest's; once more", self._remote, info.name)
        if self._bring(info, partial) != info.checksum:
            raise OSError(errno.EIO, "its checksum is not the manifest's", str(partial))

    def _bring(self, info: ShardInfo, partial: Path) -> int:
        """Its checksum. An OSError is the remote's."""
        checksum, remote = 0, self._remote / info.name
        with _on_disk(partial):
            file = partial.open("r+b", buffering=0)
        with file:
            for offset in range(0, info.bytes, _BLOCK_BYTES):
                block = remote.read(offset, min(_BLOCK_BYTES, info.bytes - offset))
                with self._counting:
                    self.bytes_fetched += len(block)
                checksum = zlib.crc32(block, checksum)
                view = memoryview(block)
                with _on_disk(partial):
                    while view:
                        view = view[file.write(view) :]
            with _on_disk(partial):
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
        with _on_disk(partial):
            os.truncate(partial, 0)  # what a killed process left
        while True:
            with _locked(self._top / ".lock", keep=True), _on_disk(partial):
                tars, taken = [], 0
                for file in self._top.glob("*/*.tar*"):
                    with contextlib.suppress(FileNotFoundError):
                        if file.suffix == _PARTIAL and _removed_if_abandoned(file):
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
def _on_disk(path: Path) -> Iterator[None]:
    """An error of the cache's own disk is the user's to mend; no shard is at fault."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CrispError(
                f"{path}: no space left; make room, lower --data.cache-gb, or name another disk with --data.cache"
            ) from error
        raise CrispError(
            f"{path}: {error.strerror or error}; name a folder that can be written with --data.cache"
        ) from error


def _touch(path: Path) -> None:
    """Set the time of its last use. The kernel's own notion of now stands still for 4 ms, in which many are used."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


@contextlib.contextmanager
def _locked(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """The file, made if need be, locked against other threads and processes; the kernel unlocks it for the dead.

    Args:
        path: of the file.
        keep: it is never removed or renamed, so that whoever has it locked has the one at `path`.
    """
    while True:
        with _on_disk(path):
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


def _removed_if_abandoned(partial: Path) -> bool:
    """Remove it if nobody is writing it; under its lock, as somebody who has made it may be about to lock it."""
    descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(partial, descriptor):  # else it has become a tar, or another's, since it was opened
            partial.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
