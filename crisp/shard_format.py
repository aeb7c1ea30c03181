"""What a folder of shards holds: the index's row, the manifest, and how both are read and checked (NumPy only).

    shard-000000.tar   WebDataset: for each sample KEY.jpg (or .png, .webp), KEY.cls, KEY.json
    shard-000000.idx   DALI's index of that tar
    index.npy          one row of `INDEX_DTYPE` per sample, in shard order: what random access needs
    manifest.json      `Manifest`
    rejected.jsonl     one line per file that was not taken: source, reason

A sample's id is its row in `index.npy`. Opening costs the same for a thousand samples and for a hundred million.
"""

import dataclasses
import enum
import hashlib
import json
import mmap
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from crisp.errors import CrispError

FORMAT_VERSION = 2
INDEX_FILE = "index.npy"
MANIFEST_FILE = "manifest.json"
REJECTED_FILE = "rejected.jsonl"

# 33 bytes per sample. `offset` is where the image's bytes begin in the tar, not its header.
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("shard", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("label", "<i4"),
        ("checksum", "<u4"),  # CRC-32 of the image's bytes
        ("codec", "u1"),
    ]
)


class Codec(enum.IntEnum):
    """Container of an image's bytes, by its first bytes and not by its name."""

    JPEG = 1
    PNG = 2
    WEBP = 3

    @property
    def extension(self) -> str:
        """Member extension in the tar."""
        return {Codec.JPEG: "jpg", Codec.PNG: "png", Codec.WEBP: "webp"}[self]


def detect_codec(data: bytes | memoryview) -> Codec | None:
    """Codec by the magic bytes; None if it is none of those kept."""
    head = bytes(data[:12])
    if head[:3] == b"\xff\xd8\xff":
        return Codec.JPEG
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return Codec.PNG
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Codec.WEBP
    return None


class ShardInfo(NamedTuple):
    """One tar. A tuple, since there may be many thousands."""

    name: str
    """File name of the tar, e.g. shard-000000.tar"""
    samples: int
    bytes: int
    """Size of the tar"""
    checksum: int
    """CRC-32 of the tar"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What was written, and what the index must be."""

    samples: int
    rejected: int
    classes: tuple[str, ...]
    """Class ids by label (WordNet ids of ImageNet); empty where nothing is labelled"""
    shards: tuple[ShardInfo, ...]
    index_fingerprint: str
    """`fingerprint` of the index"""
    made_from: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The choices and the state of the source that decide the shards' bytes: who shards again must have the same"""
    version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """As JSON types, with a checksum of all the rest; shards by column, which is read twice as fast as by row."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["shards"] = {name: [getattr(info, name) for info in self.shards] for name in ShardInfo._fields}
        return values | {_CHECKSUM: _checksum(values)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Manifest":
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: not what `to_json` gives.
        """
        values = {name: value for name, value in values.items() if name != _CHECKSUM}
        columns = [values["shards"][name] for name in ShardInfo._fields]
        shards = tuple(map(ShardInfo._make, zip(*columns, strict=True)))
        return Manifest(**{**values, "classes": tuple(values["classes"]), "shards": shards})


_CHECKSUM = "checksum"


def _checksum(values: dict[str, Any]) -> int:
    """CRC-32 of a manifest's other fields, as JSON."""
    return zlib.crc32(json.dumps({name: value for name, value in values.items() if name != _CHECKSUM}).encode())


def fingerprint(index: NDArray[np.void], *, rows: int = 512) -> str:
    """SHA-256 over the index's length and at most `rows` evenly spaced rows, so that opening stays fast at any size.

    Small indices are covered whole; in large ones a change of a few rows can pass: it tells whether this is the index
    of that manifest. The shards' sizes and each sample's checksum are the guards of the bytes.
    """
    digest = hashlib.sha256(f"{len(index)} {index.dtype.itemsize}".encode())
    if len(index):
        picked = np.unique(np.linspace(0, len(index) - 1, min(rows, len(index))).astype(np.int64))
        digest.update(np.ascontiguousarray(index[picked]).tobytes())
    return digest.hexdigest()


def open_shards(folder: Path) -> tuple[Manifest, NDArray[np.void]]:
    """The manifest and the memory-mapped index of a folder, checked against each other.

    The tars are not looked at: `ShardSet` does so when it opens one, or all at once if it is asked to, and compares
    bytes when they are read; `crisp shard verify` does everything.

    Raises:
        CrispError: no such folder, a file missing, an index that is not the one the manifest names.
    """
    manifest = read_manifest(folder)
    remedy = "it was changed after the manifest was written; restore it or shard the source again"
    try:
        index = _map_index(folder / INDEX_FILE)
    except (ValueError, EOFError) as error:
        raise CrispError(f"{folder / INDEX_FILE}: not a readable index ({error}); {remedy}") from error
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.samples,):
        raise CrispError(
            f"{folder / INDEX_FILE}: {index.shape} rows of {index.dtype.itemsize} bytes, the manifest says "
            f"{manifest.samples} of {INDEX_DTYPE.itemsize}; {remedy}"
        )
    if fingerprint(index) != manifest.index_fingerprint:
        raise CrispError(f"{folder / INDEX_FILE}: its fingerprint is not the manifest's; {remedy}")
    return manifest, index


def _map_index(path: Path) -> NDArray[np.void]:
    """The array of a .npy file, read-only. NumPy's own memmap would let each scattered row read megabytes ahead."""
    with path.open("rb") as file:
        if (version := npy.read_magic(file)) != (1, 0):
            raise ValueError(f"npy format version {version}")
        shape, _, dtype = npy.read_array_header_1_0(file)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        if file.tell() + int(np.prod(shape)) * dtype.itemsize != len(mapped):
            raise ValueError(f"{len(mapped)} bytes do not hold {shape} rows of {dtype.itemsize}")
        return np.ndarray(shape, dtype, mapped, file.tell())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder that also holds an index.

    Raises:
        CrispError: no such folder, a file missing, not a manifest, another version.
    """
    if not folder.is_dir():
        raise CrispError(f"{folder}: no such folder; write shards with 'crisp shard SOURCE {folder}'")
    for name in (MANIFEST_FILE, INDEX_FILE):
        if not (folder / name).is_file():
            raise CrispError(f"{folder}: no {name}, so not a folder of shards; write one with 'crisp shard SOURCE OUT'")
    return parse_manifest((folder / MANIFEST_FILE).read_bytes(), str(folder / MANIFEST_FILE), whole=False)


def parse_manifest(data: bytes, where: str, *, whole: bool = True) -> Manifest:
    """A manifest from its file's bytes.

    Args:
        data: UTF-8 JSON.
        where: the file, for errors.
        whole: compare its checksum, which takes as long as the rest.

    Raises:
        CrispError: not a manifest, another version, changed since it was written.
    """
    try:
        values = json.loads(data)
        version = values["version"]
        if version != FORMAT_VERSION:
            raise CrispError(
                f"{where}: format version {version}, this crisp reads {FORMAT_VERSION}; shard the source again"
            )
        manifest = Manifest.from_json(values)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise CrispError(f"{where}: not a manifest ({error!r}); shard the source again") from error
    if whole and values.get(_CHECKSUM) != _checksum(values):
        raise CrispError(f"{where}: its checksum is not that of its content; restore it or shard the source again")
    return manifest
