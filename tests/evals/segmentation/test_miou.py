import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from crisp.errors import CrispError
from crisp.evals.segmentation.miou import class_ious, count_pairs, mean_iou


def score(truth: list[int], predicted: list[int], ignored: tuple[int, ...] = (255,)) -> float:
    as_labels = [torch.tensor(labels, dtype=torch.uint8) for labels in (truth, predicted)]
    return mean_iou(count_pairs(*as_labels).numpy(), ignored)


def test_by_hand() -> None:
    assert score([0, 0, 1, 1], [0, 1, 1, 1]) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_ignored_truth_is_not_scored() -> None:
    assert score([0, 0, 255, 255], [0, 0, 1, 0]) == 1


def test_an_ignored_label_that_is_predicted_adds_a_class_without_hits() -> None:
    assert score([0, 0, 1, 1], [0, 0, 1, 255]) == pytest.approx((1 + 1 / 2 + 0) / 3)
    counts = count_pairs(torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([0, 255], dtype=torch.uint8))
    assert class_ious(counts.numpy(), (255,)) == {0: 1.0, 1: 0.0, 255: 0.0}


def test_a_class_in_neither_is_not_averaged() -> None:
    assert score([3, 3, 200], [3, 3, 200]) == 1


@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, predicted = rng.choice([0, 1, 2, 7, 150, 255], size=(2, 3, 1000)).astype(np.uint8)
    predicted[truth == 1] = 1
    kept = ~np.isin(truth, (0, 255))
    expected = jaccard_score(truth[kept], predicted[kept], average="macro")
    counts = count_pairs(torch.from_numpy(truth), torch.from_numpy(predicted)).numpy()
    assert mean_iou(counts, (0, 255)) == pytest.approx(expected, abs=1e-12)
    parts = [count_pairs(torch.from_numpy(t), torch.from_numpy(p)) for t, p in zip(truth, predicted, strict=True)]
    assert (sum(parts) == torch.from_numpy(counts)).all()  # type: ignore[union-attr]


def test_the_counts_are_left_as_they_were() -> None:
    counts = count_pairs(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([0, 0], dtype=torch.uint8)).numpy()
    before = counts.copy()
    mean_iou(counts, (255,))
    assert (counts == before).all()


def test_nothing_to_score() -> None:
    with pytest.raises(CrispError, match="every pixel has an ignored label"):
        score([255, 255], [0, 1])


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="the shapes differ"):
        score([0, 0], [0])
