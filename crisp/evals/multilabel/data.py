"""Images with several labels each, whatever their layout, and the checks that all layouts share."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.evals.images import FileImages

IGNORED = -1
"""In targets: the image counts neither for nor against the class"""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiLabelImages:
    """A split: N images, and what is on each."""

    source: FileImages
    targets: NDArray[np.int8]
    """[N, C]: 1 present, 0 absent, IGNORED"""
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiLabelSet:
    """A data set as it was found."""

    name: str
    """voc2012, coco2014, coco2017 or vg"""
    train: MultiLabelImages
    val: MultiLabelImages


def check_positives(images: MultiLabelImages, what: str) -> None:
    """Each class must be on some image.

    Raises:
        CrispError: one is on none; the first is named.
    """
    if empty := np.flatnonzero(~(images.targets == 1).any(axis=0)).tolist():
        raise CrispError(
            f"{what}: no image shows class {images.classes[empty[0]]!r}, and so for {len(empty)} of "
            f"{len(images.classes)} classes; its annotations are incomplete, unpack them again"
        )


def targets_from_pairs(images: int, classes: int, pairs: Sequence[tuple[int, int]]) -> NDArray[np.int8]:
    """[N, C] with 1 at each (image, class), 0 elsewhere."""
    targets = np.zeros((images, classes), np.int8)
    if pairs:
        targets[tuple(np.array(pairs).T)] = 1
    return targets


def read_annotations(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CrispError: missing, or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CrispError(f"{path}: {error.strerror}; unpack the official annotations there") from error
    except ValueError as error:
        raise CrispError(f"{path}: not JSON ({error}); download the annotations again") from error
