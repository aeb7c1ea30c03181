"""One shard: a WebDataset tar by webdataset's own writer, DALI's index of it, and its rows of `index.npy`.

Members of a sample, keyed by its number in the source: KEY.jpg (.png, .webp) with the file's bytes, KEY.cls with the
label (absent where there is none, as WebDataset has it), KEY.json with source, height and width. Times and owners
are fixed: equal samples give equal bytes.
"""

import contextlib
import functools
import importlib
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from crisp.shard_format import INDEX_DTYPE, ShardInfo
from crisp.shard_imagenet.examine import Sample

_BLOCK = 512  # of a tar: a member is one block of header (its names are short) and its data, padded to blocks


def plan_shards(sizes: Iterable[int], shard_bytes: int) -> Iterator[int]:
    """Number of consecutive files of each shard, from their sizes alone.

    What is rejected later makes a shard smaller and moves nothing else: a shard depends on its own files only, so
    shards can be written by anyone, in any order, or again.
    """
    members = 3 * _BLOCK + 2 * _BLOCK  # headers, and about a block each for .cls and .json
    count, total = 0, 0
    for size in sizes:
        size += members
        if count and total + size > shard_bytes:
            yield count
            count, total = 0, 0
        count, total = count + 1, total + size
    if count:
        yield count


def write_shard(folder: Path, number: int, samples: Iterable[Sample]) -> tuple[ShardInfo, NDArray[np.void]] | None:
    """Write `shard-NUMBER.tar` and `.idx` and return their entry and index rows [samples] of INDEX_DTYPE.

    Both appear under their names when whole. Without any sample nothing is written, and the result is None.

    Raises:
        OSError: as from any writing.
    """
    samples = iter(samples)
    first = next(samples, None)
    if first is None:
        return None
    name = f"shard-{number:06d}"
    rows: list[tuple[int, ...]] = []
    lines: list[str] = []
    with (
        whole_file(folder / f"{name}.tar") as stream,
        _tar_writer()(stream, encoder=False, mtime=0, user="crisp", group="crisp", mode=0o444) as writer,
    ):
        for sample in itertools.chain([first], samples):
            members = _members(sample)
            offsets = [_append(writer, sample, extension, data) for extension, data in members.items()]
            lines.append(_dali_line(sample, members, offsets))
            rows.append(_row(sample, offsets[0], number))
    size = (folder / f"{name}.tar").stat().st_size
    with whole_file(folder / f"{name}.idx") as stream:
        stream.write(f"v1.2 {len(lines)}\n{''.join(lines)}".encode())
    return ShardInfo(name=f"{name}.tar", samples=len(rows), bytes=size), np.array(rows, INDEX_DTYPE)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name when it is complete and on the disk; on any error it is removed."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _key(sample: Sample) -> str:
    return f"{sample.file.number:09d}"  # no dot: readers split a member's name at its first one


def _members(sample: Sample) -> dict[str, bytes]:
    """Bytes by extension, the image first."""
    members = {sample.codec.extension: sample.data}
    if sample.file.label >= 0:
        members["cls"] = str(sample.file.label).encode()
    about = {"source": sample.file.path, "height": sample.height, "width": sample.width}
    members["json"] = json.dumps(about).encode()  # ASCII: also names that are not valid UTF-8 survive
    return members


def _append(writer: Any, sample: Sample, extension: str, data: bytes) -> int:
    """Add one member; the offset of its data in the tar."""
    offset: int = writer.tarstream.offset + _BLOCK
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
        "label": sample.file.label,
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
