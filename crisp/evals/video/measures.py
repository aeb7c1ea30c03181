"""Region similarity J and contour accuracy F of one object, and their statistics over frames, as DAVIS defines them.

Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", CVPR 2016; statistics
and border cases as the toolkit of DAVIS-2017 has them.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crisp.evals.video.frames import import_cv2
from crisp.evals.video.protocol import (
    CONTOUR_TOLERANCE_OF_DIAGONAL,
    DECAY_BINS,
    EMPTY_CONTOURS_F,
    EMPTY_UNION_J,
    ONE_EMPTY_CONTOUR_F,
    RECALL_ABOVE,
)

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Of a measure over an object's scored frames, as shares of 1."""

    mean: float
    recall: float
    """Share of frames above .5"""
    decay: float
    """Mean of the first quarter of frames minus that of the last"""


def region_similarity(truth: Mask, predicted: Mask) -> float:
    """J: intersection over union of two masks [H, W]; 1 where both are empty."""
    union = np.count_nonzero(truth | predicted)
    return np.count_nonzero(truth & predicted) / union if union else EMPTY_UNION_J


def contour(mask: Mask) -> Mask:
    """Pixels [H, W] that differ from their neighbour in the east, south or south-east; none beyond the border."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    east, south, south_east = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    edges: Mask = (mask ^ east) | (mask ^ south) | (mask ^ south_east)
    return edges


def tolerance_px(height_px: int, width_px: int) -> int:
    """How far a contour pixel may be from its match."""
    return math.ceil(CONTOUR_TOLERANCE_OF_DIAGONAL * math.hypot(height_px, width_px))


def contour_accuracy(truth: Mask, predicted: Mask) -> float:
    """F: harmonic mean of the shares of contour pixels of two masks [H, W] that lie near the other's contour.

    Near is within `tolerance_px`, by dilation with a disk. 1 where both contours are empty, 0 where one is.
    """
    ours, theirs = contour(predicted), contour(truth)
    count_ours, count_theirs = np.count_nonzero(ours), np.count_nonzero(theirs)
    if not count_ours and not count_theirs:
        return EMPTY_CONTOURS_F
    if not count_ours or not count_theirs:
        return ONE_EMPTY_CONTOUR_F
    disk = _disk(tolerance_px(*truth.shape))
    inside = _bounding_box(ours | theirs)  # nothing outside it can match
    ours, theirs = ours[inside], theirs[inside]
    precision = np.count_nonzero(ours & _dilate(theirs, disk)) / count_ours
    recall = np.count_nonzero(theirs & _dilate(ours, disk)) / count_theirs
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def statistics(values: NDArray[np.float64]) -> Statistics:
    """Mean, recall and decay of a measure [n] over n scored frames, at least one.

    The bins of the decay have their edges at round(linspace(1, n, 5) + 1e-10) − 1, and hold both their ends.
    """
    edges = (np.round(np.linspace(1, len(values), DECAY_BINS + 1) + 1e-10) - 1).astype(np.int64)
    first, last = values[edges[0] : edges[1] + 1], values[edges[-2] : edges[-1] + 1]
    return Statistics(
        mean=float(values.mean()),
        recall=float((values > RECALL_ABOVE).mean()),
        decay=float(first.mean() - last.mean()),
    )


def _disk(radius_px: int) -> NDArray[np.uint8]:
    offsets = np.arange(-radius_px, radius_px + 1)
    return (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius_px**2).astype(np.uint8)


def _dilate(mask: Mask, disk: NDArray[np.uint8]) -> Mask:
    dilated: Mask = import_cv2().dilate(mask.astype(np.uint8), disk).astype(bool)
    return dilated


def _bounding_box(mask: Mask) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
