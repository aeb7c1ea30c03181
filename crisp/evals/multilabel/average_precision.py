"""Average precision of one class, in its two common forms; images of equal score enter together."""

import numpy as np
from numpy.typing import NDArray

from crisp.evals.multilabel.data import IGNORED


def precision_recall(
    scores: NDArray[np.floating], truth: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall when the images of at least a score are taken, from the highest score down.

    Args:
        scores: [N].
        truth: [N], 1 or 0, at least one 1.

    Returns:
        Two arrays [T], one value for each distinct score.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last_of_score = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(scores) - 1)
    right = np.cumsum(truth[order] == 1)[last_of_score]
    return right / (last_of_score + 1), right / right[-1]


def step_sum(scores: NDArray[np.floating], truth: NDArray[np.integer]) -> float:
    """Σ (R_n − R_{n−1}) P_n, as scikit-learn's `average_precision_score`."""
    precision, recall = precision_recall(scores, truth)
    return float(np.sum(np.diff(recall, prepend=0) * precision))


def voc_area(scores: NDArray[np.floating], truth: NDArray[np.integer]) -> float:
    """The area below the interpolated curve (at each recall the best precision at that recall or above), as PASCAL VOC
    defines it since 2010."""
    precision, recall = precision_recall(scores, truth)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * best))


def mean_average_precision(scores: NDArray[np.floating], targets: NDArray[np.int8]) -> tuple[float, float]:
    """Both forms, averaged over classes, in [0, 1].

    Args:
        scores: [N, C].
        targets: [N, C] 1, 0 or IGNORED: that image is left out of that class; each class has a 1.
    """
    both = []
    for column in range(targets.shape[1]):
        counted = targets[:, column] != IGNORED
        ours, truth = scores[counted, column], targets[counted, column]
        both.append((step_sum(ours, truth), voc_area(ours, truth)))
    steps, areas = np.mean(both, axis=0)
    return float(steps), float(areas)
