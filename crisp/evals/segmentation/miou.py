"""Mean intersection over union from counts: a macro Jaccard index over all pixels of a split at once."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.errors import CrispError

LABELS = 256
"""Labels are uint8"""


def count_pairs(truth: Tensor, predicted: Tensor) -> Tensor:
    """How often each label was predicted where each is true. Counts of disjoint pixels add up.

    Args:
        truth: labels uint8, any shape.
        predicted: labels uint8, the same shape and device.

    Returns:
        [256, 256] int64 by (truth, predicted).
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth {tuple(truth.shape)} and predicted {tuple(predicted.shape)}: the shapes differ")
    pairs = truth.flatten().to(torch.int32) * LABELS + predicted.flatten().to(torch.int32)
    return torch.bincount(pairs, minlength=LABELS * LABELS).view(LABELS, LABELS)


def mean_iou(counts: NDArray[np.int64], ignored: Sequence[int]) -> float:
    """Macro Jaccard index in [0, 1] over the labels of truth and prediction, where truth is not an ignored label.

    An ignored label that is predicted on such a pixel is a label like any other, with an IoU of 0, as scikit-learn's
    `jaccard_score` has it after the pixels were selected.

    Args:
        counts: [256, 256] int64 by (truth, predicted).
        ignored: labels of the truth that are left out.

    Raises:
        CrispError: no pixel is left.
    """
    return float(np.mean(list(class_ious(counts, ignored).values())))


def class_ious(counts: NDArray[np.int64], ignored: Sequence[int]) -> dict[int, float]:
    """Jaccard index in [0, 1] by label, of the labels that `mean_iou` averages."""
    counts = counts.copy()
    counts[list(ignored)] = 0
    if not counts.any():
        raise CrispError(f"every pixel has an ignored label {tuple(ignored)}: nothing to score; check the ignored ids")
    hits, true, said = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    union = true + said - hits
    return {int(label): float(hits[label] / union[label]) for label in np.flatnonzero(union)}
