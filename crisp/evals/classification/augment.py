"""The random crop and flip of linear probes, as a pure function of (seed, epoch, image)."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from crisp.evals.classification.protocol import CROP_ASPECT, CROP_PX, CROP_SCALE, FLIP_PROBABILITY
from crisp.philox import Stream, uniforms, word
from crisp.pipelines.plan import central_windows, draw_windows


@dataclass(frozen=True, slots=True)
class RandomCropFlip:
    """torchvision's RandomResizedCrop (bilinear, its default) and RandomHorizontalFlip, with draws by address.

    Args:
        seed: of the training.
        epoch: from 0.
        side_px: of the square that comes out.
    """

    seed: int
    epoch: int
    side_px: int = CROP_PX

    def window(self, image: int, *, height_px: int, width_px: int) -> tuple[int, int, int, int]:
        """x, y, width, height of an image's crop."""
        height, width = np.array([height_px]), np.array([width_px])
        windows = central_windows(height, width, CROP_ASPECT)[:, None].copy()  # [1, 1, 4]
        low, high = (np.array([share]) for share in CROP_SCALE)
        draw_windows(
            windows, word(self.seed), word(self.epoch), np.array([image], np.uint64), height, width, low, high,
            math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1]),
        )  # fmt: skip
        x, y, w, h = windows[0, 0].tolist()
        return x, y, w, h

    def flips(self, image: int) -> bool:
        """Whether an image is mirrored."""
        draws = uniforms(Stream.APPEARANCE, seed=self.seed, epoch=self.epoch, sample=image, blocks=1)
        return bool(draws[0] < FLIP_PROBABILITY)

    def __call__(self, image: Image.Image, number: int) -> Image.Image:
        """The prepared image."""
        x, y, w, h = self.window(number, height_px=image.height, width_px=image.width)
        # Cropped before it is resized: a resize of a box would look past its edges.
        cropped = image.crop((x, y, x + w, y + h)).resize((self.side_px, self.side_px), Image.Resampling.BILINEAR)
        return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flips(number) else cropped


def epoch_order(images: int, *, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """[N] int64: the images' order in an epoch, a permutation that depends on these arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(images)
