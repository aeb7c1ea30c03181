"""Zero mean and unit variance per dimension, fitted once on features that need not fit in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.distributed import World, gather_over_ranks

IMAGES_AT_A_TIME = 64
"""Fixed, and not an option: the sums, to the last bit, depend on it and not on the number of ranks"""


@dataclass(frozen=True, slots=True)
class Standardiser:
    """What scikit-learn's StandardScaler computes."""

    mean: Tensor
    """[D] float32"""
    std: Tensor
    """[D] float32, of the population (divided by n); 1 where a dimension is constant"""

    def __call__(self, features: Tensor) -> Tensor:
        """[N, D] float32 → [N, D] float32."""
        return self.in_place(features.clone())

    def in_place(self, features: Tensor) -> Tensor:
        """The same, without a copy."""
        return features.sub_(self.mean).div_(self.std)


def fit_standardiser(features: NDArray[np.float32], images: NDArray[np.int64], world: World) -> Standardiser:
    """Mean and standard deviation of every patch of some images, in float64. Collective: ranks share the images.

    Args:
        features: [N, n, D], a memory map is read in pieces.
        images: [m] which of the N, sorted.
        world: this rank's.
    """
    pieces = np.array_split(images, range(IMAGES_AT_A_TIME, len(images), IMAGES_AT_A_TIME))
    mine = [_moments(features[piece]) for piece in pieces[world.rank :: world.size]]
    shares = gather_over_ranks(mine)
    in_order = [shares[i % world.size][i // world.size] for i in range(len(pieces))]
    count, mean, squares = _merge(in_order)
    variance = squares / count
    # What rounding makes of a constant: the bound of the two-pass algorithm, as StandardScaler takes it.
    eps = np.finfo(np.float64).eps
    constant = variance <= count * eps * variance + (count * mean * eps) ** 2
    std = np.where(constant, 1.0, np.sqrt(variance))
    return Standardiser(torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(std.astype(np.float32)))


_Moments = tuple[int, NDArray[np.float64], NDArray[np.float64]]
"""Number of rows, their mean [D], and the sum of squares about it [D]"""


def _moments(features: NDArray[np.float32]) -> _Moments:
    rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
    mean = rows.mean(axis=0)
    return len(rows), mean, np.square(rows - mean).sum(axis=0)


def _merge(pieces: Sequence[_Moments]) -> _Moments:
    """Moments of the union (Chan, Golub and LeVeque, 1983)."""
    count, mean, squares = pieces[0]
    for more, other_mean, other_squares in pieces[1:]:
        total = count + more
        apart = other_mean - mean
        mean = mean + apart * (more / total)
        squares = squares + other_squares + np.square(apart) * (count * more / total)
        count = total
    return count, mean, squares
