"""Principal components of an image's patch tokens, scaled and coloured as CAPI shows them (NumPy; pure functions).

Axes: n patches, D width, c components.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.viz.sheet import Image, coloured

Array = NDArray[np.float64]

LIMIT = 2.3
"""Standard deviations at which colours saturate"""
DIVERGING = "coolwarm"


def principal_components(tokens: NDArray[np.floating], count: int) -> Array:
    """Where each patch lies along the first components of its own image.

    Each component is whitened by its own variance (n − 1), then all are divided by the first one's standard deviation
    (n): every one ends with standard deviation 1. Signs are such that the skew is positive. A component in which the
    patches do not differ (an empty image) is 0.

    Args:
        tokens: [n, D].
        count: c, up to D and below n.

    Returns:
        [n, c].

    Raises:
        CrispError: more components than there can be.
    """
    patches, width = tokens.shape
    if not 1 <= count <= min(patches - 1, width):
        raise CrispError(
            f"components={count}: {patches} patches of width {width} have {min(patches - 1, width)}; "
            f"take larger images or fewer components"
        )
    centred = np.asarray(tokens, np.float64) - np.mean(tokens, axis=0, dtype=np.float64)
    # The smaller of the two Gram matrices has the same components: D is 1024 where n may be 4900.
    wide = patches <= width
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)  # ascending
    along = vectors[:, ::-1][:, :count]
    scores = along if wide else centred @ along
    if wide:
        scores = scores * np.sqrt(np.maximum(values[::-1][:count], 0))
    spread = scores.std(axis=0, ddof=1)
    there = spread > 1e-7 * max(spread[0], np.abs(tokens).max() * np.finfo(np.float32).eps)
    whitened = np.where(there, scores / np.where(there, spread, 1), 0)
    if there[0]:
        whitened = whitened / whitened[:, 0].std()
    skew = np.mean((whitened - whitened.mean(axis=0)) ** 3, axis=0)
    return np.where(skew < 0, -whitened, whitened)


def unit_range(components: Array) -> Array:
    """±`LIMIT` → [0, 1], clipped."""
    return np.clip((components + LIMIT) / (2 * LIMIT), 0, 1)


def composite(components: Array, grid: tuple[int, int]) -> Image:
    """The first three as red, green and blue, a pixel per patch.

    Args:
        components: [n, c], c ≥ 3.
        grid: rows and columns, n in all.

    Returns:
        [rows, columns, 3] uint8.
    """
    return (unit_range(components[:, :3]) * 255).round().astype(np.uint8).reshape(*grid, 3)


def one_by_one(components: Array, grid: tuple[int, int]) -> list[Image]:
    """Each in diverging colours, blue below and red above 0: c of [rows, columns, 3] uint8."""
    return [coloured(unit_range(values).reshape(grid), DIVERGING) for values in components.T]
