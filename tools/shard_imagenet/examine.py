"""One file of the source: read it, decode it to the end, and take it or say why not.

What passes here must never fail later in a renderer, so the check is strict: an image that its decoder only reads
with a warning is rejected. It sees a cut file, zeros in place of the tail, and damage within the compressed data
where the format can tell: always in a PNG (checksums), in a JPEG whenever the coded data stops fitting. WebP has
neither checksums nor an end mark: a cut one is noticed, zeros within its length are not.
"""

import io
import struct
import zlib
from dataclasses import dataclass

import simplejpeg
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from crisp.shard_format import Codec, detect_codec
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.listing import Entry, Rejection
from crisp.shard_imagenet.reading import SourceReader
from crisp.shard_imagenet.reencode import replaces_check, transform

_MAX_BYTES = 2**32 - 1  # the index holds a length in 32 bits
_LARGE_BYTES = 64 * 1024 * 1024
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
# What Pillow's readers raise on damaged files; a test feeds them thousands.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, IndexError, TypeError, EOFError, struct.error, zlib.error)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An image that was taken: the bytes to store, and what the index says of them."""

    entry: Entry
    data: bytes
    codec: Codec
    height: int
    """Pixels as stored: an EXIF rotation is not applied"""
    width: int
    checksum: int
    """CRC-32 of `data`"""


class RejectedError(Exception):
    """Carries the reason why a file is not taken."""


def examine(entry: Entry, reader: SourceReader, cfg: ShardConfig) -> Sample | Rejection:
    """Read and check one file, and re-encode it if `cfg` wants that. Safe in threads.

    Raises:
        OSError: the file cannot be read. That is no verdict on the image: the run stops, and goes on when it can.
    """
    try:
        data, codec = _read(entry, reader)
        data, codec, height, width = _checked(data, codec, cfg)
    except RejectedError as rejected:
        return Rejection(entry.name, str(rejected))
    return Sample(entry=entry, data=data, codec=codec, height=height, width=width, checksum=zlib.crc32(data))


def _read(entry: Entry, reader: SourceReader) -> tuple[bytes, Codec]:
    if entry.size > _MAX_BYTES:
        raise RejectedError(f"too large: {entry.size} bytes")
    if entry.size > _LARGE_BYTES:  # such as an archive that was forgotten there: not read for nothing
        _codec(reader.head(entry, 12))
    data = reader.read(entry)
    if data is None:
        raise RejectedError("no bytes in its row")
    return data, _codec(data[:12])


def _codec(head: bytes) -> Codec:
    if not head:
        raise RejectedError("empty")
    if head[:4] == b"GIF8":
        raise RejectedError("GIF: DALI cannot decode it")
    codec = detect_codec(head)
    if codec is None:
        raise RejectedError(f"not JPEG, PNG or WebP: it begins with {head!r}")
    return codec


def _checked(data: bytes, codec: Codec, cfg: ShardConfig) -> tuple[bytes, Codec, int, int]:
    """Decode strictly, and re-encode if that is wanted: what to store, and its size (height, width)."""
    if cfg.short_side is None and not cfg.orient:
        return data, codec, *check(data, codec, max_pixels=cfg.max_pixels)
    if codec is Codec.JPEG:  # most of them need not be decoded twice
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            _check_pixels(height, width, cfg.max_pixels)
            if replaces_check(data, codec, height, width, cfg):
                return transform(data, codec, height, width, cfg)
        except ValueError as error:
            raise RejectedError(f"damaged or unusual JPEG: {error}") from error
    height, width = check(data, codec, max_pixels=cfg.max_pixels)
    return transform(data, codec, height, width, cfg)


def check(data: bytes, codec: Codec, *, max_pixels: int) -> tuple[int, int]:
    """Decode strictly; the size (height, width) in pixels.

    Raises:
        RejectedError: the image is damaged, or has too many pixels.
    """
    if codec is Codec.JPEG:
        return _check_jpeg(data, max_pixels)
    try:
        return _check_png(data, max_pixels) if codec is Codec.PNG else _check_webp(data, max_pixels)
    except _PILLOW_ERRORS as error:
        raise RejectedError(f"damaged {codec.name}: {error}") from error


def _check_jpeg(data: bytes, max_pixels: int) -> tuple[int, int]:
    # All coded data is read whatever the output; grey at an eighth of the size leaves out only the arithmetic after
    # that, which cannot fail: same verdicts as a full decode (tested), a quarter less time, and little memory.
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(height, width, max_pixels)
        simplejpeg.decode_jpeg(data, "gray", fastdct=True, fastupsample=True, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        raise RejectedError(f"damaged or unusual JPEG: {error}") from error
    return height, width


def _check_png(data: bytes, max_pixels: int) -> tuple[int, int]:
    # The readers' own classes: Image.open would add a limit on pixels of its own.
    width, height = PngImageFile(io.BytesIO(data)).size
    _check_pixels(height, width, max_pixels)
    PngImageFile(io.BytesIO(data)).verify()  # every chunk's checksum
    PngImageFile(io.BytesIO(data)).load()
    if _PNG_END not in data[-65536:]:
        raise RejectedError("damaged PNG: no end mark")
    return height, width


def _check_webp(data: bytes, max_pixels: int) -> tuple[int, int]:
    image = WebPImageFile(io.BytesIO(data))
    width, height = image.size
    _check_pixels(height, width, max_pixels)
    if image.n_frames > 1:
        raise RejectedError(f"animated WebP: {image.n_frames} frames")
    image.load()
    return height, width


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise RejectedError(f"too many pixels: {width}x{height}, more than {max_pixels}")
