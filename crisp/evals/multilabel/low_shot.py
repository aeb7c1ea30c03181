"""A few training images of each class."""

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.evals.multilabel.data import MultiLabelImages


def low_shot(images: MultiLabelImages, shots: int, seed: int) -> NDArray[np.int64]:
    """`shots` images for each class, sampled greedily and without replacement.

    In each of `shots` rounds, each class in turn takes a random image that shows it and that no class has taken yet. So
    there are shots · C images in all, more than `shots` of them may show a frequent class, and the images of fewer
    shots with the same seed are among them. All labels of a chosen image are used.

    Args:
        images: to choose from.
        shots: images per class.
        seed: of the choice.

    Returns:
        [shots · C] numbers in increasing order.

    Raises:
        CrispError: no image is left for a class.
    """
    generator = np.random.default_rng(seed)
    # One order per class, drawn at the start: what a class takes doesn't shift what others draw.
    orders = [generator.permutation(np.flatnonzero(column == 1)).tolist() for column in images.targets.T]
    taken: set[int] = set()
    for _ in range(shots):
        for name, order in zip(images.classes, orders, strict=True):
            chosen = next((image for image in order if image not in taken), None)
            if chosen is None:
                raise CrispError(
                    f"shots={shots}: class {name!r} has {len(order)} training images, none of them is left; "
                    f"give fewer shots"
                )
            taken.add(chosen)
    return np.array(sorted(taken))
