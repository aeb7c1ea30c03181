"""One shard: a WebDataset tar by webdataset's own writer, DALI's index of it, and its rows of `index.npy`.

Members of a sample, keyed by its number in the source: KEY.jpg (.png, .webp) with the image's bytes, KEY.cls with the
label (absent where there is none, as WebDataset has it), KEY.json with source, height and width. Times and owners
are fixed: equal samples give equal bytes.
"""

import functools
import importlib
import importlib.util
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from crisp.shard_format import INDEX_DTYPE, ShardInfo
from crisp.shard_imagenet.examine import Sample
from crisp.shard_imagenet.storage import Location

BLOCK = 512  # of a tar: a member is one block of header (its names are short) and its data, padded to blocks
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
        with _tar_writer()(stream, encoder=False, mtime=0, user="crisp", group="crisp", mode=0o444) as writer:
            for sample in itertools.chain([first], samples):
                members = _members(sample)
                offsets = [_append(writer, sample, extension, data) for extension, data in members.items()]
                lines.append(_dali_line(sample, members, offsets))
                rows.append(_row(sample, offsets[0], number))
        info = ShardInfo(name=f"{name}.tar", samples=len(rows), bytes=stream.size, checksum=stream.checksum)
        with (folder / f"{name}.idx").whole_file() as index:
            index.write(f"v1.2 {len(lines)}\n{''.join(lines)}".encode())
        before_naming(info, np.array(rows, INDEX_DTYPE))
    return info


class _Checksummed:
    """What is written to a file, counted and checked on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0
        self.checksum = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.checksum = zlib.crc32(data, self.checksum)
        return self._file.write(data)


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


def _append(writer: Any, sample: Sample, extension: str, data: bytes) -> int:
    """Add one member; the offset of its data in the tar."""
    offset: int = writer.tarstream.offset + BLOCK
    writer.write({"__key__": _key(sample), extension: data})
    return offset


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


@functools.cache
def _tar_writer() -> type[Any]:
    """webdataset's TarWriter without torch.

    `import webdataset` imports torch where it is installed: 1.4 s and 480 MB resident in every process that writes.
    The writer needs none of it, so its module is loaded with its siblings under a package of our own, whose
    `__init__` is empty. The price: this leans on writer.py standing alone in that folder, which a test watches.
    """
    spec = importlib.util.find_spec("webdataset")
    assert spec is not None, "webdataset is a dependency of this package"
    package = ModuleType(f"{__package__}._webdataset_files")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[package.__name__] = package
    writer: type[Any] = importlib.import_module(f"{package.__name__}.writer").TarWriter
    return writer
