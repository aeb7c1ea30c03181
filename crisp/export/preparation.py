"""How images are prepared for an exported backbone: as the evaluations do it, whatever the size."""

from dataclasses import dataclass

from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD

CROP_SHARE = 0.875
"""Middle of the shorter side that is kept: 224 of 256 px"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """Pixels in [0, 1] resized, cut and normalised, in this order."""

    resize_px: int
    """Shorter side after the resize"""
    crop_px: int
    """Side of the middle square"""
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def preparation_for(image_px: int) -> Preparation:
    """That of images of this side."""
    return Preparation(resize_px=int(image_px / CROP_SHARE), crop_px=image_px)
