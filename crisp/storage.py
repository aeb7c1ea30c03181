"""Files and folders by path or URL: local ones directly, others through fsspec, with retries.

Whatever is written appears under its name when it is whole: a local file is written beside its place, synced and
renamed; an object of a store becomes visible when its upload is complete.
"""

import contextlib
import functools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from crisp.errors import CrispError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

ATTEMPTS = 7
FIRST_WAIT_S = 0.25  # doubled each time: a store may be away for a quarter of a minute
_SILENCE_S = 30  # a connection that says nothing for as long is given up, and tried again
# Errors that another attempt will not mend.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


class Found(NamedTuple):
    """One name in a folder."""

    name: str
    is_file: bool
    is_folder: bool
    is_link: bool
    size: int
    """Bytes of a file"""


@dataclass(frozen=True, slots=True)
class Location:
    """A file or a folder: a local path, or a URL that fsspec knows."""

    url: str
    """A local path has no protocol in front"""

    @staticmethod
    def of(text: "str | os.PathLike[str]") -> "Location":
        """From a path or URL; `file://` is taken off.

        Raises:
            CrispError: a protocol that is unknown, or whose package is not installed.
        """
        url = os.fspath(text)
        if url.startswith("file://"):
            url = url[len("file://") :]
        location = Location(url.rstrip("/") or "/")
        if "://" in location.url:
            _file_system(location.protocol)  # what is missing is said before any work
        return location

    @property
    def protocol(self) -> str:
        """'' for a local path."""
        return self.url.partition("://")[0] if "://" in self.url else ""

    @property
    def local(self) -> Path | None:
        """As a path, if it is one."""
        return None if self.protocol else Path(self.url)

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    # --- looking ----------------------------------------------------------------------------------------------------

    def is_folder(self) -> bool:
        """There is such a folder; in a store: something lies below."""
        if (path := self.local) is not None:
            return path.is_dir()
        return bool(_with_retries(lambda: self._remote().isdir(self.url), self))

    def size(self) -> int | None:
        """Bytes of a file; None if there is no such file."""
        try:
            if (path := self.local) is not None:
                return path.stat().st_size if path.is_file() else None
            info = _with_retries(lambda: self._remote().info(self.url), self)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if info["type"] != "file" else int(info["size"] or 0)

    def children(self) -> list[Found]:
        """What lies right in the folder, sorted by name.

        Raises:
            OSError: it cannot be listed.
        """
        if (path := self.local) is not None:
            with os.scandir(path) as entries:
                return sorted(map(_found, entries))
        rows = _with_retries(lambda: self._remote().ls(self.url, detail=True), self)
        found = {}
        for row in rows:
            name = row["name"].rstrip("/").rpartition("/")[2]
            is_folder = row["type"] == "directory"
            # Some stores list the folder itself as an empty object.
            if name and row["name"].rstrip("/") != self.url.partition("://")[2]:
                found[name] = Found(name, not is_folder, is_folder, False, int(row["size"] or 0))
        return sorted(found.values())

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """The whole file, or `size` bytes of it.

        Raises:
            OSError: it cannot be read, or ends too early.
        """
        if (path := self.local) is not None:
            with path.open("rb", buffering=0) as stream:
                stream.seek(offset)
                return stream.readall() if size is None else _exactly(stream.read(size) or b"", size, self)
        if size == 0:
            return b""
        start, end = offset or None, None if size is None else offset + size  # no range where all of it is wanted

        def fetch() -> bytes:
            data: bytes = self._remote().cat_file(self.url, start=start, end=end)
            return data if size is None else _exactly(data, size, self)

        return _with_retries(fetch, self)

    def open(self) -> IO[bytes]:
        """For reading, seekable; of a remote file, parts are fetched as they are read.

        Raises:
            OSError: it cannot be opened.
        """
        if (path := self.local) is not None:
            return path.open("rb")
        size = self.size()
        if size is None:
            raise FileNotFoundError(2, "No such file or directory", self.url)
        return _RemoteFile(self, size)  # type: ignore[return-value]

    # --- writing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def whole_file(self) -> Iterator[IO[bytes]]:
        """A file to write, which takes its name when it is complete and stored; on any error nothing remains.

        Raises:
            OSError: as from any writing; it names the file.
        """
        path = self.local
        if path is None:
            with tempfile.TemporaryDirectory(prefix="crisp-") as folder:
                whole = Path(folder) / "file"
                with whole.open("w+b") as stream:
                    yield stream
                self._upload(whole)
            return
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except OSError as error:  # what `write` raises names no file
            if error.filename is None and error.errno is not None:
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        finally:
            partial.unlink(missing_ok=True)

    def _upload(self, file: Path) -> None:
        size = file.stat().st_size

        def upload() -> None:
            self._remote().put_file(str(file), self.url)
            stored = self._remote().info(self.url)["size"]
            if stored != size:
                raise OSError(f"{stored} bytes arrived of {size}")

        _with_retries(upload, self)

    def remove(self) -> None:
        """Remove a file, if it is there."""
        if (path := self.local) is not None:
            path.unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            _with_retries(lambda: self._remote().rm_file(self.url), self)

    def make_folder(self) -> None:
        """Make a local folder and those above it; a store needs none."""
        if (path := self.local) is not None:
            path.mkdir(parents=True, exist_ok=True)

    def remove_folder(self) -> None:
        """Remove a folder of files."""
        for child in self.children():
            (self / child.name).remove()
        if (path := self.local) is not None:
            path.rmdir()

    def _remote(self) -> Any:
        return _file_system(self.protocol)


class _RemoteFile:
    """Enough of a file for tarfile and pyarrow, over `Location.read`, so that every read is retried and complete."""

    def __init__(self, location: Location, size: int) -> None:
        self._location, self._size = location, size
        self._at, self._block, self._block_at = 0, b"", 0
        self.closed = False

    _BLOCK = 4 * 1024 * 1024

    def read(self, size: int = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._size, self._at + size)
        parts = []
        while self._at < end:
            if not self._block_at <= self._at < self._block_at + len(self._block):
                self._block_at = self._at
                length = min(max(self._BLOCK, end - self._at), self._size - self._at)
                self._block = self._location.read(self._at, length)
            start = self._at - self._block_at
            part = self._block[start : start + end - self._at]
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self.closed, self._block = True, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        """Nothing is written."""

    def __enter__(self) -> "_RemoteFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _found(entry: os.DirEntry[str]) -> Found:
    try:
        is_file, is_folder = entry.is_file(), entry.is_dir()
    except OSError:  # a link that leads to itself
        is_file, is_folder = False, False
    return Found(entry.name, is_file, is_folder, entry.is_symlink(), entry.stat().st_size if is_file else 0)


def _exactly(data: bytes, size: int, location: Location) -> bytes:
    if len(data) > size:
        raise CrispError(
            f"{location}: the server sent {len(data)} bytes where {size} were asked for; it does not answer byte "
            f"ranges (Python's http.server, for one), use one that does"
        )
    if len(data) != size:
        raise OSError(5, f"{len(data)} bytes in place of {size}: cut short", str(location))
    return data


@functools.cache
def _file_system(protocol: str) -> Any:
    """fsspec's file system; one for each protocol, as nothing but the environment configures it."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
            }
        return fsspec.filesystem(protocol, **options)
    except ValueError as error:
        raise CrispError(f"{protocol}://: {error}; give a path, or a URL of s3, gs or http") from error
    except ImportError as error:
        raise CrispError(f"{protocol}://: {error}; install 'crisp-ssl[remote]'") from error


def _transient() -> tuple[type[BaseException], ...]:
    """What a network raises. fsspec passes on the exceptions of whatever it uses, which are there once it is."""
    import fsspec.exceptions

    kinds: list[type[BaseException]] = [OSError, EOFError, fsspec.exceptions.FSTimeoutError]
    if (aiohttp := sys.modules.get("aiohttp")) is not None:
        kinds.append(aiohttp.ClientError)
    if (botocore := sys.modules.get("botocore.exceptions")) is not None:
        kinds += [botocore.BotoCoreError, botocore.ClientError]
    return tuple(kinds)


def _with_retries(call: Callable[[], _T], location: Location) -> _T:
    wait_s = FIRST_WAIT_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except _LASTING:
            raise
        except _transient() as error:
            reason = str(error) or type(error).__name__
            if attempt == ATTEMPTS:
                raise OSError(5, f"{reason} ({ATTEMPTS} attempts)", str(location)) from error
            log.warning("%s: %s; again in %.2g s", location, reason, wait_s)
        time.sleep(wait_s)
        wait_s *= 2
    raise AssertionError("the last attempt returns or raises")
