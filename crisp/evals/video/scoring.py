"""J and F of predicted masks on disk: per object over its frames, then averaged over all objects of a split."""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crisp.errors import CrispError
from crisp.evals.video.checks import SequenceFacts
from crisp.evals.video.masks import read_mask
from crisp.evals.video.measures import Statistics, contour_accuracy, region_similarity, statistics
from crisp.evals.video.protocol import FRAMES_LEFT_OUT_AT_EACH_END
from crisp.evals.video.sequences import VideoSequence

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectScore:
    """One object of one sequence."""

    sequence: str
    object_id: int
    frames: int
    """How many were scored"""
    region: Statistics
    """J"""
    contour: Statistics
    """F"""


def scored_frames(start: int, count: int) -> range:
    """Frames in which an object counts: neither the one where it is given nor the last of the sequence's `count`."""
    return range(start + FRAMES_LEFT_OUT_AT_EACH_END, count - FRAMES_LEFT_OUT_AT_EACH_END)


def score_sequence(
    sequence: VideoSequence, facts: SequenceFacts, folder: Path, *, single_object: bool, threads: int
) -> list[ObjectScore]:
    """Scores of a sequence's objects, by id.

    Args:
        sequence: with its true masks.
        facts: what `check_data` found.
        folder: of the predicted masks.
        single_object: see `VideoData`.
        threads: that read and compare masks.

    Raises:
        CrispError: a predicted mask is missing or has another size.
    """
    count = len(sequence.frames)
    wanted = {index: scored_frames(start, count) for index, start in facts.objects.items()}

    def compare(frame: int) -> dict[int, tuple[float, float]]:
        truth = read_mask(sequence.truths[frame], single_object=single_object)
        path = folder / sequence.mask_name(frame)
        predicted = read_mask(path)
        if predicted.shape != truth.shape:
            raise CrispError(f"{path}: it has another size than {sequence.truths[frame]}; remove {folder}")
        values = {}
        for index, frames in wanted.items():
            if frame in frames:
                pair = truth == index, predicted == index
                values[index] = region_similarity(*pair), contour_accuracy(*pair)
        return values

    with ThreadPoolExecutor(threads) as pool:
        compared = list(pool.map(compare, range(count)))
    scores = []
    for index, frames in sorted(wanted.items()):
        if not frames:
            log.warning("%s: object %d is given too late to be scored, and left out", sequence.name, index)
            continue
        J, F = np.array([compared[frame][index] for frame in frames], dtype=np.float64).T
        scores.append(
            ObjectScore(
                sequence=sequence.name, object_id=index, frames=len(frames), region=statistics(J), contour=statistics(F)
            )
        )
    return scores


def averages(scores: Sequence[ObjectScore]) -> Mapping[tuple[str, str], float]:
    """Percentages over all objects, by measure (the paper's J&F, J, F) and statistic; the means come first.

    Raises:
        CrispError: there are no objects.
    """
    if not scores:
        raise CrispError("video: no object has a frame to be scored in; give longer sequences")
    regions, contours = [score.region for score in scores], [score.contour for score in scores]
    J, F = _mean([s.mean for s in regions]), _mean([s.mean for s in contours])
    return {
        ("J&F", "mean"): (J + F) / 2,
        ("J", "mean"): J,
        ("F", "mean"): F,
        ("J", "recall"): _mean([s.recall for s in regions]),
        ("J", "decay"): _mean([s.decay for s in regions]),
        ("F", "recall"): _mean([s.recall for s in contours]),
        ("F", "decay"): _mean([s.decay for s in contours]),
    }


def table(scores: Sequence[ObjectScore]) -> str:
    """CSV with a line per object, in percent."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(
        ["sequence", "object", "frames", "J", "J-recall", "J-decay", "F", "F-recall", "F-decay"]
    )  # fmt: skip
    for s in scores:
        figures = [v for part in (s.region, s.contour) for v in (part.mean, part.recall, part.decay)]
        lines.writerow([s.sequence, s.object_id, s.frames, *(f"{100 * value:.4f}" for value in figures)])
    return text.getvalue()


def _mean(values: Sequence[float]) -> float:
    return 100 * float(np.mean(values))
