"""Predictions of some images counted against the truth, the images shared by the ranks."""

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.distributed import World, sum_over_ranks
from crisp.evals.segmentation.bank import StandardisedRows, rows_of
from crisp.evals.segmentation.miou import LABELS, count_pairs
from crisp.evals.segmentation.prepared import SplitArrays
from crisp.evals.segmentation.standardise import Standardiser

Choice = TypeVar("Choice", bound=Hashable)

QUERY_BYTES = 4 * 2**30
"""Memory for the patches that are predicted before they are counted. The bank is read once for each such block: the
validation sets are one at ViT-S"""
_ROWS_COUNTED = 8192


def count_predictions(
    predict: Callable[[Tensor], Mapping[Choice, Tensor]],
    choices: list[Choice],
    split: SplitArrays,
    images: NDArray[np.int64],
    standardiser: Standardiser,
    world: World,
) -> dict[Choice, NDArray[np.int64]]:
    """How often each label was predicted where each is true, by hyper-parameters. Collective.

    Args:
        predict: standardised patches [M, D] float32 on the device → labels of their pixels, [M, p*p] uint8 (or [M, 1],
            the same for all pixels of a patch), for each of `choices`.
        choices: hyper-parameters.
        split: where the images are.
        images: which of them.
        standardiser: of the features.
        world: this rank's.

    Returns:
        [256, 256] int64 by (truth, predicted) for each choice, the same on every rank.
    """
    n, pixels = split.truth.pixels.shape[1:]
    truth = split.truth.pixels.reshape(-1, pixels)
    counts = torch.zeros(len(choices), LABELS, LABELS, dtype=torch.int64, device=world.device)
    mine = np.array_split(images, world.size)[world.rank]
    at_a_time = images_at_a_time(n, split.features.shape[-1], pixels * len(choices))
    for start in range(0, len(mine), at_a_time):
        rows = rows_of(mine[start : start + at_a_time], n)
        queries = StandardisedRows(split.features, rows, standardiser).whole(torch.float32, world.device)
        predicted = predict(queries)
        for first in range(0, len(rows), _ROWS_COUNTED):
            part = slice(first, first + _ROWS_COUNTED)
            true = torch.from_numpy(truth[rows[part]]).to(world.device)
            for i, choice in enumerate(choices):
                counts[i] += count_pairs(true, predicted[choice][part].to(world.device).expand_as(true))
    summed = sum_over_ranks(counts).cpu().numpy()
    return dict(zip(choices, summed, strict=True))


def images_at_a_time(n: int, dim: int, predicted_bytes: int) -> int:
    """How many images of n patches make a block.

    A patch takes itself in float32, twice more and in bfloat16 within the search, and what is predicted for it.
    """
    return max(1, QUERY_BYTES // (n * (14 * dim + predicted_bytes)))
