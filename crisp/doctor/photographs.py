"""JPEGs to load where no data set is at hand: noise of several scales, which decodes at about the cost of a photograph.

Sizes are those of ImageNet's photographs; a file has about as many bytes as one of them.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LONG_PX, SHORT_PX = 500, 375
QUALITY = 92
_SCALES_PX = ((125, 70.0, 3), (25, 40.0, 3), (5, 25.0, 1), (1, 14.0, 1))
"""Size of the grain, its strength in levels of 255, and its channels: fine grain is gray, as in photographs"""


def write_photographs(folder: Path, count: int, *, seed: int = 0) -> list[Path]:
    """`folder/class-N/NNN.jpg` in two classes, every third upright; the same for a seed, wherever they are made.

    Raises:
        OSError: they cannot be written.
    """
    paths = []
    for number in range(count):
        width, height = (SHORT_PX, LONG_PX) if number % 3 == 0 else (LONG_PX, SHORT_PX)
        path = folder / f"class-{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = photograph(width - number % 7, height - number % 5, np.random.default_rng([seed, number]))
        Image.fromarray(pixels).save(path, quality=QUALITY)
        paths.append(path)
    return paths


def photograph(width: int, height: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """[height, width, 3] of coarse and fine noise around a colour."""
    pixels = np.full((height, width, 3), rng.uniform(80, 170, 3))
    for grain_px, strength, channels in _SCALES_PX:
        small = rng.uniform(-strength, strength, (-(-height // grain_px), -(-width // grain_px), channels))
        small = np.broadcast_to(small, (*small.shape[:2], 3))
        levels = Image.fromarray(np.clip(small + 128, 0, 255).astype(np.uint8))
        pixels += np.asarray(levels.resize((width, height), Image.Resampling.BICUBIC), np.float64) - 128
    return np.clip(pixels, 0, 255).astype(np.uint8)
