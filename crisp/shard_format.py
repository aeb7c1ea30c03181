"""What a folder of shards holds: the index's row, the manifest, and how both are read and checked (NumPy only).

    shard-000000.tar   WebDataset: for each sample KEY.jpg (or .png, .webp), KEY.cls, KEY.json
    shard-000000.idx   DALI's index of that tar
    index.npy          one row of `INDEX_DTYPE` per sample, in shard order: what random access needs
    manifest.json      `Manifest`
    rejected.jsonl     one line per image that was not taken: source, reason

A sample's id is its row in `index.npy`.
"""

import dataclasses
import enum
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError

FORMAT_VERSION = 1
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One tar."""

    name: str
    """File name of the tar, e.g. shard-000000.tar"""
    samples: int
    bytes: int
    """Size of the tar"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What was written, and what the index must be."""

    samples: int
    rejected: int
    classes: tuple[str, ...]
    """Class names by label; empty for a flat folder"""
    shards: tuple[ShardInfo, ...]
    index_fingerprint: str
    """`fingerprint` of the index"""
    version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Manifest":
        """Inverse of `to_json`."""
        return Manifest(
            **{
                **values,
                "classes": tuple(values["classes"]),
                "shards": tuple(ShardInfo(**shard) for shard in values["shards"]),
            }
        )


def fingerprint(index: NDArray[np.void], *, rows: int = 65536) -> str:
    """SHA-256 over the index's length and at most `rows` evenly spaced rows, so that opening stays fast at any size.

    Small indices are covered whole; in large ones a change of a few rows can pass. The shards' sizes and each
    sample's checksum are the other guards.
    """
    digest = hashlib.sha256(f"{len(index)} {index.dtype.itemsize}".encode())
    if len(index):
        picked = np.unique(np.linspace(0, len(index) - 1, min(rows, len(index))).astype(np.int64))
        digest.update(np.ascontiguousarray(index[picked]).tobytes())
    return digest.hexdigest()


def open_shards(folder: Path) -> tuple[Manifest, NDArray[np.void]]:
    """The manifest and the memory-mapped index of a folder, checked against each other and the tars' sizes.

    Raises:
        CrispError: no such folder, a file missing, an index or a tar that is not the one the manifest names.
    """
    if not folder.is_dir():
        raise CrispError(f"{folder}: no such folder; write shards with 'crisp shard SOURCE {folder}'")
    for name in (MANIFEST_FILE, INDEX_FILE):
        if not (folder / name).is_file():
            raise CrispError(f"{folder}: no {name}, so not a folder of shards; write one with 'crisp shard SOURCE OUT'")
    try:
        manifest = Manifest.from_json(json.loads((folder / MANIFEST_FILE).read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CrispError(f"{folder / MANIFEST_FILE}: not a manifest ({error!r}); shard the source again") from error
    if manifest.version != FORMAT_VERSION:
        raise CrispError(
            f"{folder / MANIFEST_FILE}: format version {manifest.version}, this crisp reads {FORMAT_VERSION}; "
            f"shard the source again"
        )
    remedy = "it was changed after the manifest was written; restore it or shard the source again"
    try:
        index = np.load(folder / INDEX_FILE, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CrispError(f"{folder / INDEX_FILE}: not a readable index ({error}); {remedy}") from error
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.samples,):
        raise CrispError(
            f"{folder / INDEX_FILE}: {index.shape} rows of {index.dtype.itemsize} bytes, the manifest says "
            f"{manifest.samples} of {INDEX_DTYPE.itemsize}; {remedy}"
        )
    if fingerprint(index) != manifest.index_fingerprint:
        raise CrispError(f"{folder / INDEX_FILE}: its fingerprint is not the manifest's; {remedy}")
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            raise CrispError(f"{path}: missing; restore it or shard the source again")
        if path.stat().st_size != shard.bytes:
            raise CrispError(f"{path}: {path.stat().st_size} bytes, the manifest says {shard.bytes}; {remedy}")
    return manifest, index
