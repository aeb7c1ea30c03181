from pathlib import Path

import numpy as np
import pytest

from crisp.errors import CrispError
from crisp.evals.multilabel.data import IGNORED, MultiLabelImages
from crisp.evals.multilabel.low_shot import low_shot
from crisp.evals.multilabel.voc import open_voc2012
from tests.evals.multilabel import layouts


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> MultiLabelImages:
    return open_voc2012(layouts.voc(tmp_path_factory.mktemp("voc"), per_split=160)).train


@pytest.mark.parametrize("shots", [1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_each_class_gets_images_of_its_own(images: MultiLabelImages, shots: int, seed: int) -> None:
    numbers = low_shot(images, shots, seed)
    assert len(numbers) == len(set(numbers.tolist())) == 20 * shots
    assert ((images.targets[numbers] == 1).sum(axis=0) >= shots).all()
    assert numbers.tolist() == low_shot(images, shots, seed).tolist()
    # Images and classes can be paired: `shots` images for each class, each image for one class it shows.
    assert _paired(images.targets[numbers] == 1, shots)


def _paired(shows: np.ndarray, shots: int) -> bool:
    """Whether the images can be dealt to classes that they show, `shots` to each (augmenting paths)."""
    slots = np.repeat(shows.T, shots, axis=0)  # [C · shots, n]
    holder: dict[int, int] = {}

    def place(slot: int, seen: set[int]) -> bool:
        for image in np.flatnonzero(slots[slot]).tolist():
            if image not in seen:
                seen.add(image)
                if image not in holder or place(holder[image], seen):
                    holder[image] = slot
                    return True
        return False

    return all(place(slot, set()) for slot in range(len(slots)))


def test_fewer_shots_are_a_part_of_more_and_seeds_differ(images: MultiLabelImages) -> None:
    one, two, five = (set(low_shot(images, shots, 0).tolist()) for shots in (1, 2, 5))
    assert one < two < five
    assert len({tuple(low_shot(images, 1, seed).tolist()) for seed in range(5)}) == 5


def test_ignored_images_are_not_taken_and_too_few_are_refused(tmp_path: Path, images: MultiLabelImages) -> None:
    targets = images.targets.copy()
    dogs = np.flatnonzero(targets[:, 11] == 1)
    targets[dogs[2:], 11] = IGNORED
    fewer = MultiLabelImages(source=images.source, targets=targets, classes=images.classes)
    for seed in range(5):
        assert (targets[low_shot(fewer, 1, seed), 11] == 1).any()
    with pytest.raises(CrispError, match="shots=5: class 'dog' has 2 training images, none of them is left"):
        low_shot(fewer, 5, 0)
