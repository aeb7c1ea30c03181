import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from crisp.evals.multilabel.average_precision import mean_average_precision, step_sum, voc_area
from crisp.evals.multilabel.data import IGNORED


def drawn(seed: int, count: int, *, digits: int) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """Scores of so many digits (few: many equal ones) that know a little of the truth."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(count) < 0.3).astype(np.int8)
    truth[rng.integers(count)] = 1
    return np.round(rng.normal(size=count) + truth, digits), truth


def plain_voc(scores: NDArray[np.float64], truth: NDArray[np.int8]) -> float:
    """At each threshold precision and recall; at each recall the best precision there or further on; the area."""
    points = []
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = [bool(t) for s, t in zip(scores.tolist(), truth.tolist(), strict=True) if s >= threshold]
        points.append((sum(taken) / int(truth.sum()), sum(taken) / len(taken)))
    area, before = 0.0, 0.0
    for i, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[i:])
        before = recall
    return area


@pytest.mark.parametrize("digits", [0, 1, 8])
@pytest.mark.parametrize("count", [1, 2, 37, 400])
def test_equals_scikit_learn_and_the_plain_voc_area(count: int, digits: int) -> None:
    for seed in range(5):
        scores, truth = drawn(seed, count, digits=digits)
        assert step_sum(scores, truth) == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
        assert voc_area(scores, truth) == pytest.approx(plain_voc(scores, truth), abs=1e-12)
        assert voc_area(scores, truth) >= step_sum(scores, truth) - 1e-12


def test_known_answers() -> None:
    truth = np.array([1, 0, 1, 0], np.int8)
    assert step_sum(truth.astype(float), truth) == voc_area(truth.astype(float), truth) == 1
    assert step_sum(np.zeros(4), truth) == voc_area(np.zeros(4), truth) == 0.5  # constant: the share of positives
    assert step_sum(np.array([4.0, 3, 2, 1]), truth) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    worst = np.array([1.0, 4, 2, 3])
    assert step_sum(worst, truth) == pytest.approx(0.5 / 3 + 0.5 / 2)
    assert voc_area(worst, truth) == pytest.approx(0.5)  # at recall ½ the better precision at recall 1 counts


def test_the_mean_leaves_out_ignored_images_of_each_class() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 3))
    targets = rng.integers(-1, 2, (50, 3)).astype(np.int8)
    kept = [targets[:, c] != IGNORED for c in range(3)]
    expected = [average_precision_score(targets[kept[c], c], scores[kept[c], c]) for c in range(3)]
    areas = [plain_voc(scores[kept[c], c], targets[kept[c], c]) for c in range(3)]
    assert mean_average_precision(scores, targets) == (pytest.approx(np.mean(expected)), pytest.approx(np.mean(areas)))
