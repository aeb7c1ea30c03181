"""Index masks: reading them, and writing them with the palette that DAVIS, YouTube-VOS and MOSE share."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crisp.errors import CrispError
from crisp.evals.video.protocol import BACKGROUND_ID, VOID_ID


def read_mask(path: Path, *, single_object: bool = False) -> NDArray[np.uint8]:
    """Object ids of an index mask, with void (255) as background.

    Args:
        path: a palette or 8-bit gray PNG.
        single_object: whatever is not 0 is object 1, 255 too; colours are allowed then.

    Returns:
        [H, W] ids.

    Raises:
        CrispError: no image, a damaged one, or one of colours where ids are wanted.
    """
    try:
        with Image.open(path) as image:
            if single_object and image.mode not in ("1", "L", "P"):
                values = np.asarray(image.convert("L"))  # some masks of DAVIS-2016 are black and white in RGB
            elif image.mode in ("1", "L", "P"):
                values = np.asarray(image)
            else:
                raise CrispError(
                    f"{path}: its pixels are {image.mode}, not ids; write it as a palette or 8-bit gray PNG"
                )
    except OSError as error:
        raise CrispError(f"{path}: cannot be read as a mask ({error}); unpack the annotations again") from error
    if single_object:
        return (values != BACKGROUND_ID).astype(np.uint8)
    ids = values.astype(np.uint8)
    ids[ids == VOID_ID] = BACKGROUND_ID
    return ids


def object_ids(mask: NDArray[np.uint8]) -> tuple[int, ...]:
    """The ids in a mask other than background, ascending."""
    counts = np.bincount(mask.ravel(), minlength=BACKGROUND_ID + 1)
    return tuple(int(index) for index in np.flatnonzero(counts) if index != BACKGROUND_ID)


def write_mask(mask: NDArray[np.uint8], path: Path) -> None:
    """Write ids [H, W] as a palette PNG."""
    image = Image.fromarray(mask)
    image.putpalette(_PALETTE)
    image.save(path, format="PNG")


def _palette() -> bytes:
    """Colours of PASCAL VOC's tools: bits 0, 1, 2 of an id are red's, green's, blue's highest bits, and so on."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for channel in range(3):
        for level in range(8):
            bit = ids >> (3 * level + channel) & 1
            colours[:, channel] |= (bit << (7 - level)).astype(np.uint8)
    return colours.tobytes()


_PALETTE = _palette()
