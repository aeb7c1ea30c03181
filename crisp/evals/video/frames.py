"""A frame as the backbone gets it: DINO's sizes, OpenCV's bilinear resize of 8-bit pixels, normalised."""

from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crisp.errors import CrispError
from crisp.evals.video.protocol import LONG_SIDE_MULTIPLE_PX, SHORT_SIDE_PX, SQUARE_PX

Size = Literal["480p", "480x480"]

_EXIF_ORIENTATION = 0x0112
_LYING_ON_ITS_SIDE = (5, 6, 7, 8)


def import_cv2() -> ModuleType:
    """OpenCV.

    Raises:
        CrispError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise CrispError(
            "video: OpenCV is missing, and the protocol resizes frames with it; pip install 'crisp-ssl[eval]'"
        ) from error
    module: ModuleType = cv2
    return module


def frame_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of a frame as it is decoded (turned as its EXIF says), from its header.

    Raises:
        CrispError: not an image, or a JPEG that is cut short, of which OpenCV would make up the rest.
    """
    try:
        if path.suffix.lower() in (".jpg", ".jpeg") and not _has_its_end(path):
            raise CrispError(f"{path}: this frame is cut short; unpack the frames again")
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(_EXIF_ORIENTATION) in _LYING_ON_ITS_SIDE:
                width, height = height, width
    except OSError as error:
        raise CrispError(f"{path}: cannot be read as a frame ({error}); unpack the frames again") from error
    return height, width


def _has_its_end(path: Path) -> bool:
    """Whether a JPEG's end marker is near its end: within its data those two bytes do not occur."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return b"\xff\xd9" in file.read()


def prepared_size(height_px: int, width_px: int, *, size: Size, patch_px: int) -> tuple[int, int]:
    """Height and width in pixels that a frame is resized to.

    480p: the short side is 480, the long side keeps the aspect and is floored to a multiple of 64; a square frame is
    480 high. 480x480: both are 480. Where a patch does not divide a side (patches of 14), the side is then
    floored to whole patches: 480×832 becomes 476×826.

    Args:
        height_px, width_px: of the frame.
        size: which of the two that the paper names.
        patch_px: side of a patch.
    """
    if size == "480x480":
        height, width = SQUARE_PX, SQUARE_PX
    elif height_px > width_px:
        height, width = _long_side(height_px, width_px), SHORT_SIDE_PX
    else:
        height, width = SHORT_SIDE_PX, _long_side(width_px, height_px)
    return height // patch_px * patch_px, width // patch_px * patch_px


def _long_side(long_px: int, short_px: int) -> int:
    return SHORT_SIDE_PX * long_px // short_px // LONG_SIDE_MULTIPLE_PX * LONG_SIDE_MULTIPLE_PX


def read_frame(
    path: Path, height_px: int, width_px: int, *, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """A frame, resized and normalised.

    Args:
        path: of the image.
        height_px, width_px: wanted (`prepared_size`).
        mean, std: of the normalisation, per channel R, G, B, of pixels in [0, 1].

    Returns:
        [3, height_px, width_px] float32.

    Raises:
        CrispError: OpenCV is missing, or the frame cannot be decoded.
    """
    cv2 = import_cv2()
    pixels = cv2.imread(str(path))  # [H, W, 3] uint8, B, G, R
    if pixels is None:
        raise CrispError(f"{path}: this frame cannot be decoded; unpack the frames again")
    resized = cv2.resize(pixels, (width_px, height_px), interpolation=cv2.INTER_LINEAR)
    image = torch.from_numpy(np.ascontiguousarray(resized[:, :, ::-1].transpose(2, 0, 1))).float().div_(255)
    return image.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
