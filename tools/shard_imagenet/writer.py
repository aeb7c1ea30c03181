"""One shard: a WebDataset tar, DALI's index of it, and its rows of `index.npy`.

Members of a sample, keyed by its number in the source: KEY.jpg (.png, .webp) with the image's bytes, KEY.cls with the
label (absent where there is none, as WebDataset has it), KEY.json with source, height and width. Times and owners
are fixed: equal samples give equal bytes.

The tar is byte for byte what webdataset's TarWriter makes (tested), and written member by member: TarWriter sends all
through blocks of 10 kB, which costs a tenth of the time of checking an image, and importing it imports torch.
"""

import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable
from typing import IO

import numpy as np
from numpy.typing import NDArray

from crisp.shard_format import INDEX_DTYPE, ShardInfo
from crisp.shard_imagenet.examine import Sample
from crisp.storage import Location

BLOCK = 512  # of a tar: a member is one block of header (its names are short) and its data, padded to blocks
_SEND_BYTES = 8 * 1024 * 1024
SAMPLE_OVERHEAD_BYTES = 3 * BLOCK + 2 * BLOCK
"""What a sample takes beside its image: headers, and about a block each for .cls and .json"""


def shard_name(number: int) -> str:
    """Without extension."""
    return f"shard-{number:06d}"


def write_shard(
    folder: Location,
    number: int,
    samples: Iterable[Sample],
    *,
    before_naming: Callable[[ShardInfo | None, NDArray[np.void]], None],
) -> ShardInfo | None:
    """Write `shard-NUMBER.tar` and `.idx`; each appears under its name when it is whole, the tar last.

    Args:
        folder: where to.
        number: of the shard; rows carry it.
        samples: in order. Without any, nothing is written.
        before_naming: called with the shard's entry and its rows [samples] of INDEX_DTYPE when all is written, before
            the tar takes its name; with None and no row if there is no sample.

    Returns:
        The shard's entry; None if there is no sample.

    Raises:
        OSError: as from any writing.
    """
    samples = iter(samples)
    first = next(samples, None)
    if first is None:
        before_naming(None, np.empty(0, INDEX_DTYPE))
        return None
    name = shard_name(number)
    rows: list[tuple[int, ...]] = []
    lines: list[str] = []
    with (folder / f"{name}.tar").whole_file() as file:
        stream = _Checksummed(file)
        for sample in itertools.chain([first], samples):
            members = _members(sample)
            offsets = [_append(stream, f"{_key(sample)}.{extension}", data) for extension, data in members.items()]
            lines.append(_dali_line(sample, members, offsets))
            rows.append(_row(sample, offsets[0], number))
        stream.write(bytes(2 * BLOCK))  # the end mark, and zeros up to a whole record
        stream.write(bytes(-stream.size % tarfile.RECORDSIZE))
        info = ShardInfo(name=f"{name}.tar", samples=len(rows), bytes=stream.size, checksum=stream.checksum)
        with (folder / f"{name}.idx").whole_file() as index:
            index.write(f"v1.2 {len(lines)}\n{''.join(lines)}".encode())
        before_naming(info, np.array(rows, INDEX_DTYPE))
    return info


class _Checksummed:
    """What is written to a file, counted and checked on the way, and sent to the disk while the rest is made."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sent = 0
        self.size = 0
        self.checksum = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.checksum = zlib.crc32(data, self.checksum)
        written = self._file.write(data)
        if self.size - self._sent > _SEND_BYTES:
            # The kernel begins to write these pages and does not wait; else the sync at the end would have all to do.
            os.posix_fadvise(self._file.fileno(), self._sent, self.size - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self.size
        return written


def _key(sample: Sample) -> str:
    return f"{sample.entry.number:09d}"  # no dot: readers split a member's name at its first one


def _members(sample: Sample) -> dict[str, bytes]:
    """Bytes by extension, the image first."""
    members = {sample.codec.extension: sample.data}
    if sample.entry.label >= 0:
        members["cls"] = str(sample.entry.label).encode()
    about = {"source": sample.entry.name, "height": sample.height, "width": sample.width}
    members["json"] = json.dumps(about).encode()  # ASCII: also names that are not valid UTF-8 survive
    return members


def _append(stream: _Checksummed, name: str, data: bytes) -> int:
    """Add one member to a tar; the offset of its data."""
    stream.write(member_header(name.encode().ljust(100, b"\0"), len(data)))
    offset = stream.size
    stream.write(data)
    stream.write(bytes(-len(data) % BLOCK))
    return offset


def member_header(name: bytes, size: int) -> bytes:
    """As tarfile's, in a fifth of the time: there are three for each sample. `name` [100], padded with zeros."""
    front, middle, back = _HEADER[100:124], _HEADER[136:148], _HEADER[156:]
    octal = b"%011o\0" % size
    checksum = sum(name) + sum(octal) + _HEADER_SUM
    return b"%b%b%b%b%06o\0 %b" % (name, front, octal, middle, checksum, back)


def _header_template() -> bytes:
    info = tarfile.TarInfo("")
    info.mode, info.uname, info.gname = 0o444, "crisp", "crisp"
    return info.tobuf(tarfile.USTAR_FORMAT)


_HEADER = _header_template()
_HEADER_SUM = sum(_HEADER[100:124]) + sum(_HEADER[136:148]) + 8 * ord(" ") + sum(_HEADER[156:])


def _dali_line(sample: Sample, members: dict[str, bytes], offsets: list[int]) -> str:
    """A sample in DALI's index, version 1.2: extension, offset, size and member name of each component."""
    parts = (
        f"{extension} {offset} {len(data)} {_key(sample)}.{extension}"
        for (extension, data), offset in zip(members.items(), offsets, strict=True)
    )
    return " ".join(parts) + "\n"


def _row(sample: Sample, offset: int, shard: int) -> tuple[int, ...]:
    values = {
        "offset": offset,
        "length": len(sample.data),
        "shard": shard,
        "height": sample.height,
        "width": sample.width,
        "label": sample.entry.label,
        "checksum": sample.checksum,
        "codec": sample.codec,
    }
    return tuple(values[name] for name in INDEX_DTYPE.names or ())
