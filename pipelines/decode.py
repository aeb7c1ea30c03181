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

_TURBO_COLOURS = ("Gray", "RGB", "YCbCr")


class Decoder:
    """Decodes one image at a time into a buffer that it keeps: for use by one thread."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def __call__(self, data: memoryview) -> NDArray[np.uint8]:
        """[h, w, 3] uint8, C-contiguous; valid until the next call.

        Raises:
            CrispError: not an image that can be decoded; the message has no remedy, the caller knows the sample.
        """
        if detect_codec(data) is Codec.JPEG:
            try:
                height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
                if colours in _TURBO_COLOURS:
                    size = height * width * 3
                    if self._buffer.size < size:
                        self._buffer = np.empty(size, np.uint8)
                    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", buffer=self._buffer[:size])
                    return pixels
            except ValueError:  # an error, or only a warning such as stray bytes between segments: PIL knows which
                return _decode_with_pil(data)
        return _decode_with_pil(data)


def _decode_with_pil(data: memoryview) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I;16"):  # PIL would clip 16-bit gray to 255, not scale it
                gray = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(gray[..., None], 3, axis=-1)
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise CrispError(f"cannot be decoded ({error})") from error
