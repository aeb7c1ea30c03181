"""Sparse correspondence as iBOT measures it: which patch of another image resembles a patch most (NumPy; pure).

Axes: n patches of the first image, m of the second, D width, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crisp.geometry import apply, patch_centres

Ints = NDArray[np.int64]
Floats = NDArray[np.floating]


def best_matches(first: Floats, second: Floats) -> Ints:
    """For each patch [n, D] of the first image that of the second [m, D] with the largest dot product.

    No l2-normalisation, as iBOT has it. Of equal ones the first.

    Returns:
        [n] numbers of patches of the second image.
    """
    return (first @ second.T).argmax(axis=1)


def nearest_resize(attention: Floats, grid: int) -> Floats:
    """Maps [h, rows, columns] → [h, grid, grid], the nearest value: of 28 → 14 every second one, from the first."""
    rows, columns = (np.arange(grid) * side // grid for side in attention.shape[1:])
    return attention[:, rows[:, None], columns]


def most_attended(attention: Floats, count: int, *, among: NDArray[np.bool_] | None = None) -> Ints:
    """The patches that [CLS] attends to most, on the mean over heads; of equal ones the first.

    Args:
        attention: [h, n].
        count: how many, fewer where there are not so many.
        among: [n] the others' attention is taken as zero, and none of them is chosen.

    Returns:
        Their numbers, the most attended first.
    """
    mean = attention.mean(axis=0, dtype=np.float64)
    if among is not None:
        mean = np.where(among, mean, -1.0)
    order = np.argsort(-mean, kind="stable")[:count]
    return order[mean[order] >= 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """Which patch of the second view shows the same place, by the known affine."""

    overlap: NDArray[np.bool_]
    """[n] the centre of the first view's patch is on the second view"""
    nearest: Ints
    """[n] the second view's patch whose centre is nearest to that place; only where they overlap"""


def true_matches(second_from_first: NDArray[np.float64], *, grid: int, patch_px: int) -> Truth:
    """What is right for two views of one image.

    iBOT calls a patch overlapping if its centre lies in the second view give or take half a patch; here the centre
    itself must. Nearest in the second view's pixels is nearest in the image: crops neither turn nor shear.

    Args:
        second_from_first: [2, 3] in pixels of the views.
        grid: patches along a side, of both views.
        patch_px: side of a patch.
    """
    places = apply(second_from_first, patch_centres(grid, patch_px))  # [n, 2] (x, y)
    side = grid * patch_px
    x, y = places.T
    overlap = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    cells = np.clip(np.floor(places / patch_px).astype(np.int64), 0, grid - 1)
    return Truth(overlap=overlap, nearest=np.where(overlap, cells[:, 1] * grid + cells[:, 0], -1))


def match_accuracy(matches: Ints, truth: Truth) -> float | None:
    """Share of the overlapping patches whose match is the true nearest patch; None: nothing overlaps."""
    if not truth.overlap.any():
        return None
    return float((matches == truth.nearest)[truth.overlap].mean())
