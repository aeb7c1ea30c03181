"""Images and masks as the protocol prepares them, and the labels of patches. All pure functions.

Axes: n patches row by row, p the side of a patch in pixels.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from crisp.errors import CrispError

LABELS = 256


def prepare_image(path: Path, side_px: int) -> NDArray[np.uint8]:
    """RGB [side, side, 3], resized to a square by PIL, bicubic. An EXIF orientation is left alone: masks have none.

    Raises:
        CrispError: not a readable image.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB").resize((side_px, side_px), Image.Resampling.BICUBIC)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise CrispError(f"{path}: cannot be read as an image ({error}); copy it from the archive again") from error
    return np.asarray(image)


def prepare_mask(mask: Image.Image, side_px: int) -> NDArray[np.uint8]:
    """Label ids [side, side] of an index mask, resized to a square by PIL, nearest."""
    return np.asarray(mask.resize((side_px, side_px), Image.Resampling.NEAREST))


def patch_pixels(labels: NDArray[np.uint8], patch_px: int) -> NDArray[np.uint8]:
    """The pixel labels of each patch.

    Args:
        labels: [H, W] uint8, sides divisible by `patch_px`.
        patch_px: p.

    Returns:
        [n, p*p] uint8, patches and the pixels in them row by row.
    """
    rows, columns = labels.shape[0] // patch_px, labels.shape[1] // patch_px
    blocks = labels.reshape(rows, patch_px, columns, patch_px).transpose(0, 2, 1, 3)  # [rows, columns, p, p]
    return np.ascontiguousarray(blocks).reshape(rows * columns, patch_px * patch_px)


def mode_labels(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The most frequent label [n] of each row of [n, L]; ties go to the smallest label."""
    count = len(pixels)
    keys = np.arange(count)[:, None] * LABELS + pixels  # a histogram per row, in one
    histogram = np.bincount(keys.ravel(), minlength=count * LABELS).reshape(count, LABELS)
    return histogram.argmax(axis=1).astype(np.uint8)  # argmax takes the first of equals
