"""Index masks as files: PNGs of one byte per pixel, and the .mat files of the Semantic Boundaries Dataset."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from crisp.errors import CrispError


def read_mask(path: Path) -> Image.Image:
    """The ids in a mask file as a gray or palette image; of a palette, the indices count and not the colours.

    Raises:
        CrispError: unreadable, or not one byte per pixel.
    """
    if path.suffix == ".mat":
        return _read_sbd(path)
    try:
        with Image.open(path) as file:
            if file.mode not in ("1", "L", "P"):
                raise CrispError(
                    f"{path}: a mask of mode {file.mode}, but masks hold one id of one byte per pixel; convert the "
                    f"masks to palette or gray PNGs of ids"
                )
            file.load()
            bits = file.mode == "1"
            return Image.fromarray(np.asarray(file).astype(np.uint8)) if bits else file.copy()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise CrispError(f"{path}: cannot be read as a mask ({error}); copy it from the archive again") from error


def _read_sbd(path: Path) -> Image.Image:
    """GTcls.Segmentation of a file in SBD's `cls`."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        ids = loadmat(path)["GTcls"]["Segmentation"][0, 0]
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"Segmentation has the shape {ids.shape}")
        return Image.fromarray(np.ascontiguousarray(ids, dtype=np.uint8))
    except (OSError, MatReadError, ValueError, KeyError, IndexError, TypeError, zlib.error) as error:
        raise CrispError(f"{path}: cannot be read as a mask of SBD ({error}); unpack benchmark.tgz again") from error
