from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.evals.video.checks import check_data
from crisp.evals.video.davis import read_davis2017
from crisp.evals.video.layouts import LAYOUTS
from crisp.evals.video.masks import write_mask
from crisp.evals.video.measures import (
    contour,
    contour_accuracy,
    region_similarity,
    statistics,
    tolerance_px,
)
from crisp.evals.video.scoring import averages, score_sequence, scored_frames, table
from tests.evals.video.official import davis2017, mose, youtube_vos
from tests.evals.video.plain import plain_contour, plain_f, plain_j, plain_scores, plain_statistics

Mask = NDArray[np.bool_]


def blobs(seed: int, height: int = 41, width: int = 60, share: float = 0.5) -> Mask:
    """Smooth noise above a quantile; it reaches the borders."""
    noise = np.random.default_rng(seed).normal(size=(height + 8, width + 8))
    for axis in (0, 1):
        noise = np.apply_along_axis(lambda line: np.convolve(line, np.ones(9), "valid"), axis, noise)
    return noise > np.quantile(noise, share)


PAIRS = [
    (blobs(1), blobs(2)),
    (blobs(1), blobs(1)),
    (blobs(3, share=0.95), blobs(4, share=0.97)),
    (blobs(5, 200, 260), blobs(6, 200, 260)),  # tolerance 3 px
    (blobs(7), ~blobs(7)),
    (blobs(8), np.zeros((41, 60), dtype=bool)),
    (np.zeros((41, 60), dtype=bool), blobs(9)),
    (np.zeros((41, 60), dtype=bool), np.zeros((41, 60), dtype=bool)),
    (np.ones((41, 60), dtype=bool), np.ones((41, 60), dtype=bool)),  # no contours, though not empty
    (np.ones((41, 60), dtype=bool), np.zeros((41, 60), dtype=bool)),
]


@pytest.mark.parametrize(("truth", "predicted"), PAIRS)
def test_j_and_f_equal_the_plain_twins(truth: Mask, predicted: Mask) -> None:
    assert region_similarity(truth, predicted) == pytest.approx(plain_j(truth, predicted), abs=1e-12)
    assert contour_accuracy(truth, predicted) == pytest.approx(plain_f(truth, predicted), abs=1e-12)


@pytest.mark.parametrize("mask", [blobs(1), blobs(2, 7, 5), np.ones((3, 4), dtype=bool), np.eye(5, dtype=bool)])
def test_contour_equals_the_plain_twin(mask: Mask) -> None:
    assert [tuple(pixel) for pixel in np.argwhere(contour(mask)).tolist()] == plain_contour(mask)


def test_a_contour_lies_half_a_pixel_towards_the_origin() -> None:
    mask = np.zeros((5, 5), dtype=bool)
    mask[2, 2] = True
    assert np.argwhere(contour(mask)).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    mask = np.zeros((3, 3), dtype=bool)
    mask[2, 2] = True  # in the corner no neighbour is left
    assert np.argwhere(contour(mask)).tolist() == [[1, 1], [1, 2], [2, 1]]


def test_empty_cases() -> None:
    nothing, something = np.zeros((20, 20), dtype=bool), np.zeros((20, 20), dtype=bool)
    something[5:9, 5:9] = True
    assert region_similarity(nothing, nothing) == 1
    assert contour_accuracy(nothing, nothing) == 1
    assert contour_accuracy(something, nothing) == contour_accuracy(nothing, something) == 0
    far = np.zeros((20, 20), dtype=bool)
    far[15:18, 15:18] = True
    assert contour_accuracy(something, far) == 0


def test_tolerance_of_davis() -> None:
    assert tolerance_px(480, 854) == 8


def test_tolerance_counts_to_the_pixel() -> None:
    """854×480, two vertical edges: 8 px apart all match, 9 px none."""
    shifted = []
    for left in (400, 408, 409):
        mask = np.zeros((480, 854), dtype=bool)
        mask[:, left:] = True
        shifted.append(mask)
    assert contour_accuracy(shifted[0], shifted[1]) == 1
    assert contour_accuracy(shifted[0], shifted[2]) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 13, 48, 67, 300])
def test_statistics_equal_the_plain_twin(count: int) -> None:
    values = np.random.default_rng(count).random(count)
    got = statistics(values)
    assert (got.mean, got.recall, got.decay) == pytest.approx(plain_statistics(values.tolist()), abs=1e-12)


def test_statistics_by_hand() -> None:
    """Ten frames: edges at frames 0, 2, 5 (5.5 rounds up), 7, 9; bins hold both their ends; .5 itself is no recall."""
    values = np.array([1.0, 0.8, 0.6, 0.5, 0.5, 0.5, 0.5, 0.3, 0.2, 0.1])
    got = statistics(values)
    assert got.mean == pytest.approx(0.5)
    assert got.recall == pytest.approx(0.3)
    assert got.decay == pytest.approx(0.8 - 0.2)


def test_scored_frames_leave_out_first_and_last() -> None:
    assert list(scored_frames(0, 5)) == [1, 2, 3]
    assert list(scored_frames(2, 5)) == [3]
    assert list(scored_frames(4, 5)) == []


def write(folder: Path, masks: dict[int, NDArray[np.uint8]]) -> None:
    folder.mkdir(parents=True)
    for frame, mask in masks.items():
        write_mask(mask, folder / f"{frame:05}.png")


@pytest.mark.parametrize("seed", range(3))
def test_sequence_equals_the_plain_twin(tmp_path: Path, seed: int) -> None:
    """Three objects, of which the first mask lacks id 2; void pixels; an id that the first mask does not have."""
    random = np.random.default_rng(seed)
    root = davis2017(tmp_path / "davis", names=("bear",))
    truths, predicted = {}, {}
    for frame in range(5):
        truth, other = (
            sum(index * (blobs(10 * seed + 3 * frame + index + k, 48, 64, 0.8)).astype(np.uint8) for index in (1, 3))
            for k in (0, 100)
        )
        truths[frame] = np.clip(truth, 0, 3).astype(np.uint8)
        truths[frame][random.random(truth.shape) < 0.02] = 255
        if frame:
            truths[frame][:5, :9] = 7
        keep = random.random(truth.shape) < 0.1
        predicted[frame] = np.where(keep, np.clip(other, 0, 3), np.where(truths[frame] > 3, 0, truths[frame]))
        predicted[frame] = predicted[frame].astype(np.uint8)
    truths[0][truths[0] == 2] = 0
    for frame, mask in truths.items():
        write_mask(mask, root / f"Annotations/480p/bear/{frame:05}.png")
    write(tmp_path / "masks", predicted)
    data = read_davis2017(root, "val")
    facts = check_data(data, threads=1)["bear"]
    assert facts.objects == {1: 0, 2: 0, 3: 0}
    scores = score_sequence(data.sequences[0], facts, tmp_path / "masks", single_object=False, threads=2)
    got = averages(scores)
    expected = [100 * value for value in plain_scores(truths, predicted)]
    assert [measure for measure, _ in list(got)[:3]] == ["J&F", "J", "F"]
    statistics_ = [(measure, name) for measure in "JF" for name in ("mean", "recall", "decay")]
    assert [got[key] for key in statistics_] == pytest.approx(expected, abs=1e-4)
    assert got["J&F", "mean"] == pytest.approx((expected[0] + expected[3]) / 2, abs=1e-4)
    assert 0 < got["J", "mean"] < 100
    assert 0 < got["F", "mean"] < 100


@pytest.mark.parametrize(
    ("make", "dataset", "split"),
    [(davis2017, "davis2017", "val"), (youtube_vos, "youtube-vos", "train"), (mose, "mose", "holdout")],
)
def test_the_truth_gets_100(tmp_path: Path, make, dataset, split) -> None:  # type: ignore[no-untyped-def]
    """Known answer: perfect propagation."""
    data = LAYOUTS[dataset].read(make(tmp_path), split)
    facts = check_data(data, threads=1)
    scores = []
    for sequence in data.sequences:
        folder = sequence.truths[0].parent
        scores += score_sequence(sequence, facts[sequence.name], folder, single_object=False, threads=1)
    got = averages(scores)
    assert len(got) == 7
    assert {value for (_, statistic), value in got.items() if statistic != "decay"} == {100}
    assert got["J", "decay"] == got["F", "decay"] == 0
    lines = table(scores).splitlines()
    assert len(lines) == 1 + len(scores)
    assert lines[1].endswith("100.0000,100.0000,0.0000,100.0000,100.0000,0.0000")


def test_later_object_is_scored_from_the_frame_after_its_first(tmp_path: Path) -> None:
    data = LAYOUTS["youtube-vos"].read(youtube_vos(tmp_path), "train")
    facts = check_data(data, threads=1)
    assert facts["b"].objects == {1: 0, 2: 2}
    (b,) = (sequence for sequence in data.sequences if sequence.name == "b")
    scores = score_sequence(b, facts["b"], b.truths[0].parent, single_object=False, threads=1)
    assert [(score.object_id, score.frames) for score in scores] == [(1, 3), (2, 1)]


def test_no_objects_to_score_is_an_error() -> None:
    with pytest.raises(CrispError, match="no object has a frame to be scored in"):
        averages([])
