"""Encoded image → RGB pixels, in raw orientation: EXIF rotation is ignored, as PIL does.

libjpeg-turbo (through simplejpeg) takes ordinary JPEGs. PIL takes the rest: PNG, WebP, CMYK and YCCK JPEGs, and
JPEGs about which libjpeg-turbo warns, so that PIL decides which of those are images.
"""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from crisp.errors import CrispError
from crisp.shard_format import Codec, detect_codec

READ_AHEAD = 64
"""Bytes behind the last pixel that a vector load may touch; what they hold does not matter."""

_TURBO_COLOURS = ("Gray", "RGB", "YCbCr")


class Decoder:
    """Decodes one image at a time into memory that it keeps: for use by one thread."""

    def __init__(self) -> None:
        self._memory = np.empty(READ_AHEAD, np.uint8)

    def __call__(self, data: memoryview) -> NDArray[np.uint8]:
        """[h, w, 3] uint8, C-contiguous; valid until the next call.

        Raises:
            CrispError: not an image that can be decoded; the message has no remedy, the caller knows the sample.
        """
        memory, height, width = self.decode_flat(data)
        return memory[: height * width * 3].reshape(height, width, 3)

    def decode_flat(self, data: memoryview) -> tuple[NDArray[np.uint8], int, int]:
        """The same pixels as one row with at least `READ_AHEAD` bytes behind them; height and width."""
        if detect_codec(data) is Codec.JPEG:
            try:
                height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
                if colours in _TURBO_COLOURS:
                    size = self._reserve(height, width)
                    simplejpeg.decode_jpeg(data, "RGB", buffer=self._memory[:size])
                    return self._memory, height, width
            except ValueError:  # an error, or only a warning such as stray bytes between segments
                pass  # PIL tells them apart
        pixels = _decode_with_pil(data)
        height, width, _ = pixels.shape
        size = self._reserve(height, width)
        self._memory[:size] = pixels.ravel()
        return self._memory, height, width

    def _reserve(self, height: int, width: int) -> int:
        size = height * width * 3
        if self._memory.size < size + READ_AHEAD:
            self._memory = np.empty(size + READ_AHEAD, np.uint8)
        return size


def check_header(data: memoryview, *, height_px: int, width_px: int) -> None:
    """See whether the bytes begin as an image of that size does; some microseconds, no pixels are decoded.

    Raises:
        CrispError: they do not.
    """
    size = None
    if detect_codec(data) is Codec.JPEG:
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            size = height, width
        except ValueError:  # an error, or only a warning: PIL tells them apart
            pass
    if size is None:
        try:
            with Image.open(io.BytesIO(data)) as image:
                size = image.height, image.width
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise CrispError(f"cannot be decoded ({error})") from error
    if size != (height_px, width_px):
        raise CrispError(f"an image of {size[1]}×{size[0]} px, the index says {width_px}×{height_px}")


def _decode_with_pil(data: memoryview) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I;16"):  # PIL would clip 16-bit gray to 255, not scale it
                gray = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(gray[..., None], 3, axis=-1)
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise CrispError(f"cannot be decoded ({error})") from error
