"""Every random draw of a sample, as a pure function of (seed, epoch, sample)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All draws of B samples: what a renderer needs to make V = 2 + L views, and what the model needs beside them.

    Blur comes before colour (both are linear, so they commute but for rounding and clipping); then solarise,
    then normalise.
    """

    sample_id: NDArray[np.int64]
    """[B]"""
    crop_px: NDArray[np.int32]
    """[B, V, 4] (x, y, width, height) of each view's window in image pixels"""
    flip: NDArray[np.bool_]
    """[B, V]"""
    color_factors: NDArray[np.float32]
    """[B, V, 4] brightness, contrast, saturation (0: grayscale), hue in degrees, as DALI's color_twist takes them"""
    color_matrix: NDArray[np.float32]
    """[B, V, 3, 4] those factors as one matrix on (r, g, b, 1) in 0..255"""
    blur_sigma_px: NDArray[np.float32]
    """[B, V]; 0: no blur"""
    solarize: NDArray[np.bool_]
    """[B, V]"""
    view_from_reference: NDArray[np.float32]
    """[V, B, 2, 3]"""
    patch_masks: NDArray[np.bool_]
    """[2, B, n]"""
    region_seed: NDArray[np.int64]
    """[B, K]"""
