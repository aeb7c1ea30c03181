"""A shard's tar, followed from member to member and held against the rows of the index, for `verify.py`."""

import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crisp.shard_format import INDEX_DTYPE, INDEX_FILE, Codec, detect_codec
from crisp.shard_imagenet.writer import BLOCK, member_header

PIECE_BYTES = 1 << 20
"""Read at a time"""
_LARGEST_TEXT = 1 << 20  # of a .cls or .json; more is a damaged size
_MEMBER = re.compile(rb"(\d{9,})\.(jpg|png|webp|cls|json)\0+")


def and_more(count: int) -> str:
    """The end of a line that says only the first of some things."""
    return f"; and {count:,} more" if count > 0 else ""


class Faults:
    """The first of some faults, and how many there are."""

    def __init__(self) -> None:
        self.first, self.count = "", 0

    def add(self, text: str) -> None:
        """One more."""
        self.first, self.count = self.first or text, self.count + 1

    def __str__(self) -> str:
        return self.first + and_more(self.count - 1)


class LostError(Exception):
    """The members cannot be followed further."""


class PieceStream:
    """A file from front to end in pieces, and its CRC-32.

    Args:
        file: at its front.
        size: its bytes.
        on_piece: called with the size of each piece that was read.
    """

    def __init__(self, file: IO[bytes], size: int, on_piece: Callable[[int], None]) -> None:
        self._file, self._on_piece = file, on_piece
        self._piece, self._used = memoryview(b""), 0
        self.size, self.at, self.checksum = size, 0, 0

    def parts(self, size: int) -> Iterator[memoryview]:
        """The next `size` bytes, without a copy."""
        while size > 0:
            if self._used == len(self._piece) and not self._read():
                raise LostError("the tar ends there")
            part = self._piece[self._used : self._used + size]
            self._used += len(part)
            self.at += len(part)
            size -= len(part)
            yield part

    def take(self, size: int) -> bytes:
        """The next `size` bytes, as long as they are few."""
        if size > _LARGEST_TEXT:
            raise LostError("its size")
        if 0 <= size <= len(self._piece) - self._used:  # mostly: a fifth of all the time that is not CRC-32's
            part = bytes(self._piece[self._used : self._used + size])
            self._used += size
            self.at += size
            return part
        return b"".join(self.parts(size))

    def skip(self, size: int) -> None:
        """Pass over `size` bytes."""
        for _ in self.parts(size):
            pass

    def drain(self) -> None:
        """Read on to the end, for the CRC-32."""
        while self._read():
            pass

    def _read(self) -> bool:
        self._piece, self._used = memoryview(self._file.read(PIECE_BYTES)), 0
        self.checksum = zlib.crc32(self._piece, self.checksum)
        self._on_piece(len(self._piece))
        return len(self._piece) > 0


class _Member(NamedTuple):
    key: bytes
    """Empty if its header is damaged"""
    extension: str
    size: int


def _member(block: bytes) -> _Member | None:
    """From a header; None if it is not, byte for byte, one that `writer.py` writes."""
    match = _MEMBER.match(block[:100])
    digits = block[124:135]
    if match is None or match.end() != 100 or not digits.isdigit() or any(digit in b"89" for digit in digits):
        return None
    size = int(digits, 8)
    return _Member(match[1], match[2].decode(), size) if block == member_header(match[0], size) else None


# What of a sample is damaged if it is not what a column of the index says.
_PLACES = {
    "offset": "its place",
    "length": "the size of its image",
    "checksum": "its image",
    "codec": "its image",
    "label": "its label",
    "height": "its height and width",
    "width": "its height and width",
}


class _Sample:
    """What was found of a sample so far."""

    def __init__(self, row: int, expected: dict[str, int]) -> None:
        self.row, self.expected = row, expected
        self.found: dict[str, int] = {}
        self.members: list[tuple[int, _Member]] = []
        """Each with the offset of its data"""
        self.source = ""
        self.broken: list[str] = []
        """Places that are damaged whatever the index says"""

    @property
    def key(self) -> str:
        """Empty if no header of it is whole."""
        return next((member.key.decode() for _, member in self.members if member.key), "")

    def differences(self) -> list[str]:
        """Columns in which the index and the tar differ."""
        return [name for name, value in self.found.items() if value != self.expected[name]]

    def __str__(self) -> str:
        if not self.key:
            return f"row {self.row} of {INDEX_FILE}"
        # A name may hold anything, and is printed.
        source = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in self.source)
        return f"sample {self.key} (row {self.row}{', ' if source else ''}{source})"


class TarWalk:
    """The samples of a tar, held against their rows."""

    def __init__(self, stream: PieceStream) -> None:
        self._stream = stream
        self.keys: NDArray[np.int64] = np.empty(0, np.int64)
        self.places, self.broken, self.differences = Faults(), Faults(), Faults()
        """Where something is wrong at all; whatever the index says; where the index says something else"""
        self.idx_size = self.idx_checksum = 0
        """Of the .idx that belongs to the tar"""

    def run(self, rows: NDArray[np.void], first: int) -> None:
        """Follow the members to the tar's end, or as far as they can be followed.

        Args:
            rows: [samples] those of the tar.
            first: number of the first of them.
        """
        stream = self._stream
        self.keys = np.full(len(rows), -1, np.int64)
        self._add_to_idx(f"v1.2 {len(rows)}\n")
        begins = rows["offset"].astype(np.int64) - BLOCK
        ends = np.append(begins[1:], stream.size)
        for i, end in enumerate(ends.tolist()):
            sample = _Sample(first + i, dict(zip(INDEX_DTYPE.names or (), rows[i].item(), strict=True)))
            try:
                self._sample(sample, end)
            except LostError as lost:
                sample.broken.append(str(lost))
                self._judge(sample)
                return
            self._judge(sample)
            self.keys[i] = int(sample.key or -1)
            parts = (f"{m.extension} {offset} {m.size} {m.key.decode()}.{m.extension}" for offset, m in sample.members)
            self._add_to_idx(" ".join(parts) + "\n")
        if stream.at < stream.size or not self.places.count:  # a .json of unknown size reaches to the end
            self._end()

    def _add_to_idx(self, text: str) -> None:
        self.idx_size += len(text)
        self.idx_checksum = zlib.crc32(text.encode(), self.idx_checksum)

    def _judge(self, sample: _Sample) -> None:
        differences = sample.differences()
        places = [*(_PLACES[name] for name in differences), *sample.broken]
        if places:
            self.places.add(f"{sample}: {', '.join(dict.fromkeys(places))}")
        if sample.broken:
            self.broken.add(f"{sample}: {', '.join(sample.broken)}")
        if differences:
            said = ", ".join(f"{n} {sample.expected[n]} (in the tar {sample.found[n]})" for n in differences)
            self.differences.add(f"{str(sample).removesuffix(f' of {INDEX_FILE}')}: {said}")

    def _sample(self, sample: _Sample, end: int) -> None:
        """Follow one sample; `end` is where the next begins, by the index."""
        expected, stream = sample.expected, self._stream
        member = self._next()
        if member is None and stream.at <= expected["offset"] - BLOCK:
            sample.broken.append("what is before it")
            stream.skip(expected["offset"] - BLOCK - stream.at)
            member = self._next()
        if member is None or member.extension in ("cls", "json"):
            sample.broken.append("the header of its image")
            if stream.at != expected["offset"]:
                raise LostError("what follows it")
            codec = expected["codec"]
            member = _Member(b"", Codec(codec).extension if codec in set(Codec) else "", expected["length"])
        sample.found |= {"offset": stream.at, "length": member.size}
        self._image(sample, member)

        member = self._next()
        if member is None and expected["label"] >= 0:
            sample.broken.append("the header of its .cls")
            member = _Member(b"", "cls", len(str(expected["label"])))
        sample.found["label"] = -1
        if member is not None and member.extension == "cls":
            text = self._text(sample, member)
            if text.isdigit() and b"%d" % int(text) == text:
                sample.found["label"] = int(text)
            else:
                del sample.found["label"]
                sample.broken.append("its label")
            member = self._next()

        if member is None or member.extension != "json":
            sample.broken.append("the header of its .json")
            member = _Member(b"", "json", end - stream.at)
        self._about(sample, self._text(sample, member))
        if len({member.key for _, member in sample.members if member.key}) > 1:
            sample.broken.append("the names of its members")

    def _next(self) -> _Member | None:
        return _member(self._stream.take(BLOCK))

    def _image(self, sample: _Sample, member: _Member) -> None:
        sample.members.append((self._stream.at, member))
        head, checksum = b"", 0
        for part in self._stream.parts(member.size):
            head += part[: 12 - len(head)]
            checksum = zlib.crc32(part, checksum)
        codec = detect_codec(head)
        sample.found |= {"checksum": checksum, "codec": codec or 0}
        if codec is not None and codec.extension != member.extension:
            sample.broken.append("the extension of its image")
        self._padding(sample, member)

    def _text(self, sample: _Sample, member: _Member) -> bytes:
        sample.members.append((self._stream.at, member))
        text = self._stream.take(member.size)
        self._padding(sample, member)
        return text

    def _padding(self, sample: _Sample, member: _Member) -> None:
        if self._stream.take(-member.size % BLOCK).strip(b"\0"):
            sample.broken.append(f"the padding after its .{member.extension}")

    def _about(self, sample: _Sample, text: bytes) -> None:
        text = text.rstrip(b"\0")  # padding, if its size is not known
        try:
            about = json.loads(text)
            sample.source = str(about["source"])
            size = {"height": int(about["height"]), "width": int(about["width"])}
        except (ValueError, KeyError, TypeError):  # not JSON, or not an object with these
            sample.broken.append("its .json")
            return
        sample.found |= size
        if json.dumps({"source": sample.source, **size}).encode() != text:
            sample.broken.append("its .json")

    def _end(self) -> None:
        stream = self._stream
        # Two blocks of zeros at least, to a whole record.
        left = -(stream.at + 2 * BLOCK) % tarfile.RECORDSIZE + 2 * BLOCK
        fault = ""
        if stream.at + left != stream.size:
            fault = "its length"
        elif stream.take(left).strip(b"\0"):
            fault = "what is there is not zero"
        if fault:
            self.places.add(f"after its last sample: {fault}")
            self.broken.add(f"after its last sample: {fault}")
