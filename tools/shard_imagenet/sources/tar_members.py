"""Names and places of a tar's members, without unpacking it: all of them, or an error.

tarfile takes a tar that ends too early, or goes on with garbage, for one that is complete; here either is an error.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, NamedTuple

from crisp.errors import CrispError
from crisp.shard_imagenet.sources.wanted import unsafe
from crisp.storage import Location

_BLOCK = 512
_HEADER_MAX = 1024 * 1024  # of a long name or pax records; tarfile would read any size into memory
_PADDING_MAX = 1024 * 1024  # zeros after the end mark; tar's own default is below 10 kB

Reject = Callable[[str, str], None]
"""Called with the name of a member that is not taken, and the reason"""


class Member(NamedTuple):
    """One regular file in a tar."""

    name: str
    """With '/', without './'"""
    offset: int
    """Where its bytes begin in the file, also if the tar is only a part of that"""
    size: int


def walk_tar(file: IO[bytes], where: str, reject: Reject, *, size: int, start: int = 0) -> Iterator[Member]:
    """The regular files of a tar in its order; folders are passed over, anything else is rejected.

    Between two of them the file may be read elsewhere. Memory does not grow with their number.

    Args:
        file: seekable.
        where: names the tar in errors.
        reject: see `Reject`.
        size: bytes of the tar.
        start: where it begins in the file.

    Raises:
        CrispError: not a tar, or not a whole one.
        OSError: it cannot be read.
    """
    window = _Window(file, start, size)
    at, members = 0, 0
    try:
        with tarfile.open(fileobj=window, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:  # type: ignore[call-overload]
            while (info := tar.next()) is not None:
                tar.members.clear()  # it keeps all of them
                at, members = info.offset, members + 1
                if info.size < 0:
                    raise tarfile.ReadError("negative size")
                if info.offset_data + (info.size if info.isreg() else 0) > size:
                    raise _cut_short(where, f"within {info.name}")
                if (member := _regular(info, start, reject)) is not None:
                    yield member
            at = tar.offset
    except (tarfile.TarError, ValueError) as error:
        window.seek(0)
        if window.read(2) == b"\x1f\x8b":
            raise compressed(where) from error
        if not members:
            raise CrispError(f"{where}: not a tar, or cut short ({error}); download it again") from error
        raise _cut_short(where, f"after byte {at} ({error})") from error
    _check_end(window, at, where)


def last_of_each(members: Iterable[Member], reject: Reject) -> dict[str, Member]:
    """Members by name. Of those with the same name the last is taken, as it would remain after unpacking."""
    kept: dict[str, Member] = {}
    for member in members:
        if member.name in kept:
            reject(member.name, REPLACED)
        kept[member.name] = member
    return kept


REPLACED = "replaced: a later member has the same name"


def first_member(tar: Location) -> str:
    """Name of the first regular file of a tar; '' if it has none.

    Raises:
        CrispError, OSError: as `walk_tar`.
    """
    with tar.open() as file:
        for member in walk_tar(file, str(tar), lambda name, reason: None, size=tar.size() or 0):
            return member.name
    return ""


def compressed(where: str) -> CrispError:
    """The error for a tar that is compressed."""
    return CrispError(f"{where}: compressed, so its images cannot be read one by one; gunzip it first")


def _regular(info: tarfile.TarInfo, start: int, reject: Reject) -> Member | None:
    if info.isdir():
        return None
    if (reason := unsafe(info.name)) is not None:
        reject(info.name, reason)
    elif info.issym() or info.islnk():
        reject(info.name, "refused: link in an archive")
    elif not info.isreg() or info.issparse():
        reject(info.name, "not a regular file")
    else:
        name = "/".join(part for part in info.name.split("/") if part not in ("", "."))
        return Member(name, start + info.offset_data, info.size)
    return None


def _check_end(window: "_Window", at: int, where: str) -> None:
    """After the last member there is a block of zeros, and then nothing but a little padding."""
    window.seek(at)
    block = window.read(_BLOCK)
    if len(block) < _BLOCK:
        raise _cut_short(where, "within a header" if any(block) else "before its end mark")
    if any(block):
        raise CrispError(f"{where}: no header at byte {at}: it is damaged; download it again")
    rest = window.size - at - _BLOCK
    if rest > _PADDING_MAX or any(window.read(max(rest, 0))):
        raise CrispError(
            f"{where}: goes on for {rest} bytes after its end mark: an unfinished download, or tars that were joined; "
            f"download it again, or give the tars one by one"
        )


def _cut_short(where: str, place: str) -> CrispError:
    return CrispError(f"{where}: ends {place}: it was cut short; download it again")


class _Window:
    """A part of a file, for tarfile, which reads headers with it."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self.size = file, start, size
        self._at = 0

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_MAX:
            raise tarfile.ReadError(f"header of {size} bytes")
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(size, self.size - self._at)))
        self._at += len(data)
        return data

    def seek(self, offset: int) -> int:
        if offset < 0:
            raise tarfile.ReadError(f"offset {offset}")
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at
