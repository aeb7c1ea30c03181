"""Images made smaller or turned upright, and written as JPEG: `--short-side` and `--orient`.

Decode, resize, encode is what a script on PIL does; libjpeg-turbo and the loader's compiled resize do it in half the
time. The pixels are those of PIL's antialiased bicubic within a level, but for a few at hard edges next to black or
white, where PIL clips between rows and columns. A JPEG whose short side is four times the wanted one or more is decoded
at 1/2, 1/4 or 1/8 of its size, by libjpeg's own scaling, to no less than twice the wanted one (PIL's `reducing_gap=2`).
That bounds time and memory for huge photographs, and the loss is not seen.

The bytes that come out depend on the bytes that go in, the options, and the versions of the libraries; on processors
without fused multiply-add a few pixels may round the other way.
"""

import io
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL.Image import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from crisp.pipelines.decode import READ_AHEAD, Decoder
from crisp.shard_format import Codec
from crisp.shard_imagenet.config import ShardConfig

_TURBO_COLOURS = ("Gray", "RGB", "YCbCr")
_JPEG_MAX_PX = 65500  # a side, in libjpeg
_KEPT_BYTES = 32 * 1024 * 1024
_ORIENTATION = 0x0112
_READERS: dict[Codec, Callable[[io.BytesIO], Image]] = {
    Codec.JPEG: JpegImageFile,
    Codec.PNG: PngImageFile,
    Codec.WEBP: WebPImageFile,
}
# What PIL raises on damaged EXIF; a test feeds it thousands.
_EXIF_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error)


class _Change(NamedTuple):
    """What is to be done to an image."""

    orientation: int
    """EXIF's, to turn by after the resize; 1: none"""
    height: int
    """Pixels after the resize, before it is turned"""
    width: int


class _Memory(threading.local):
    """Where a thread decodes into: fresh memory costs a page fault per 4 kB."""

    def __init__(self) -> None:
        self._kept = np.empty(0, np.uint8)

    def reserve(self, size: int) -> NDArray[np.uint8]:
        """At least `size` bytes, valid until the next call; what a rare huge image needs is not kept."""
        if size > _KEPT_BYTES:
            return np.empty(size, np.uint8)
        if self._kept.size < size:
            self._kept = np.empty(size, np.uint8)
        return self._kept


_memory = _Memory()


def transform(data: bytes, codec: Codec, height: int, width: int, cfg: ShardConfig) -> tuple[bytes, Codec, int, int]:
    """The image as `cfg.short_side` and `cfg.orient` want it: bytes, codec, height, width. Safe in threads.

    A shorter side above `short_side` becomes exactly that, the other one is rounded. With `orient`, an EXIF orientation
    is applied; without, the pixels stay as they are stored, as loaders that ignore EXIF see them. What is changed is
    written as JPEG of `cfg.quality`, 4:2:0 (a grayscale JPEG stays gray), with neither EXIF nor colour profile. What
    needs no change keeps its bytes, and so does a strip that would be longer than a JPEG can be (65500 pixels).

    Args:
        data: an image that passed the check, or a JPEG for which `replaces_check`.
        codec: of `data`.
        height: pixels as stored; so `width`.
        width: see `height`.
        cfg: `short_side`, `orient` and `quality` count.

    Raises:
        ValueError: libjpeg-turbo does not decode a JPEG to its end without a warning.
        CrispError: PIL cannot decode another image.
    """
    change = _plan(data, codec, height, width, cfg)
    if change is None:
        return data, codec, height, width
    same_size = (change.height, change.width) == (height, width)
    reduction = 1 if same_size else _reduction(min(height, width), min(change.height, change.width))
    memory, reduction, gray = _decode(data, codec, height, width, reduction)
    if same_size:
        pixels = memory[: height * width * 3].reshape(height, width, 3)
    else:
        pixels = _resize(memory, height / reduction, width / reduction, change.height, change.width)
    pixels = turn(pixels, change.orientation)
    return _encode(pixels, cfg.quality, gray=gray), Codec.JPEG, pixels.shape[0], pixels.shape[1]


def replaces_check(data: bytes, codec: Codec, height: int, width: int, cfg: ShardConfig) -> bool:
    """Whether `transform` decodes this image as strictly as the check, which then need not read it before.

    True for most JPEGs that are changed. A ValueError of `transform` is the verdict.

    Raises:
        ValueError: a JPEG without a readable header.
    """
    if codec is not Codec.JPEG or simplejpeg.decode_jpeg_header(data)[2] not in _TURBO_COLOURS:
        return False
    return _plan(data, codec, height, width, cfg) is not None


def read_orientation(data: bytes, codec: Codec) -> int:
    """EXIF (or XMP) orientation, 1 to 8, as PIL finds it; 1 if there is none or it cannot be read."""
    if not _may_have_orientation(data, codec):
        return 1
    try:
        orientation = _READERS[codec](io.BytesIO(data)).getexif().get(_ORIENTATION)
    except _EXIF_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """[h, w, 3] uint8 as stored → upright, [h, w, 3] or [w, h, 3], by an EXIF orientation from 1 to 8."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels if orientation == 1 else np.ascontiguousarray(pixels)


def resize_pixels(image: NDArray[np.uint8], out_height: int, out_width: int) -> NDArray[np.uint8]:
    """[h, w, 3] uint8 → [out_height, out_width, 3] uint8, antialiased bicubic: what `transform` does in between."""
    height, width, _ = image.shape
    memory = np.empty(image.size + READ_AHEAD, np.uint8)
    memory[: image.size] = image.ravel()
    return _resize(memory, height, width, out_height, out_width)


def _plan(data: bytes, codec: Codec, height: int, width: int, cfg: ShardConfig) -> _Change | None:
    """None: the bytes are kept."""
    orientation = read_orientation(data, codec) if cfg.orient else 1
    out_height, out_width = height, width
    if cfg.short_side is not None and min(height, width) > cfg.short_side:
        scaled = round(max(height, width) * cfg.short_side / min(height, width))
        out_height, out_width = (cfg.short_side, scaled) if height <= width else (scaled, cfg.short_side)
    same_size = (out_height, out_width) == (height, width)
    if (same_size and orientation == 1) or max(out_height, out_width) > _JPEG_MAX_PX:
        return None
    return _Change(orientation, out_height, out_width)


def _may_have_orientation(data: bytes, codec: Codec) -> bool:
    """False for nearly all images, in microseconds, where PIL takes a tenth of a millisecond and for a PNG decodes it.

    A JPEG is not searched beyond its header: that would take half a millisecond.
    """
    if codec is Codec.WEBP:
        return data[12:16] == b"VP8X"  # the extended format
    if codec is Codec.PNG:
        return any(mark in data for mark in (b"eXIf", b"profile type exif", b"tiff:Orientation"))
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # segments up to the start of scan
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])
    return any(data.find(mark, 0, at) >= 0 for mark in (b"Exif\0", b"tiff:Orientation"))


def _reduction(short: int, out_short: int) -> int:
    """By how much libjpeg may shrink the image. Its factors between the powers of two are not faster than none."""
    return next((reduction for reduction in (8, 4, 2) if short >= 2 * reduction * out_short), 1)


def _decode(data: bytes, codec: Codec, height: int, width: int, reduction: int) -> tuple[NDArray[np.uint8], int, bool]:
    """RGB pixels as one row with `READ_AHEAD` bytes behind them, how much smaller they are, and whether all are gray.

    Valid until the next call in this thread.
    """
    colours = simplejpeg.decode_jpeg_header(data)[2] if codec is Codec.JPEG else None
    if colours not in _TURBO_COLOURS:
        memory, _, _ = Decoder().decode_flat(memoryview(data))
        return memory, 1, False
    height, width = -(-height // reduction), -(-width // reduction)
    size = height * width * 3
    memory = _memory.reserve(size + READ_AHEAD)
    pixels = simplejpeg.decode_jpeg(
        data, "RGB", min_height=height, min_width=width, min_factor=reduction, buffer=memory[:size]
    )
    assert pixels.shape == (height, width, 3)
    return memory, reduction, colours == "Gray"


def _resize(
    memory: NDArray[np.uint8], height_px: float, width_px: float, out_height: int, out_width: int
) -> NDArray[np.uint8]:
    from crisp.pipelines.pixels import resize_image  # numba: half a second and 90 MB

    padded = resize_image(memory, float(height_px), float(width_px), out_height, out_width)
    return padded[:out_height, :out_width]


def _encode(pixels: NDArray[np.uint8], quality: int, *, gray: bool) -> bytes:
    """[h, w, 3] → baseline JPEG with the tables that PIL has; of `gray` pixels the first channel.

    Below quality 96 libjpeg-turbo takes its fast DCT whatever `fastdct` says, where PIL takes the accurate one: at 90
    the same size and 0.07 dB less, at 95 0.3 dB.
    """
    if gray:
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[:, :, :1]), quality, "GRAY", "Gray", fastdct=False)
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", "420", fastdct=False)
