"""Random regions of given sizes around given seeds: what a discovered region must do better than.

Axes: B images, K regions, N patches of a grid row by row.
"""

import numpy as np
from numpy.typing import NDArray

from crisp.jit import compiled


def scattered_regions(
    seeds: NDArray[np.int64], sizes: NDArray[np.int64], draws: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """The seed and the other patches with the smallest draws: a random set of patches, connected or not.

    Args:
        seeds: [B, K] in [0, N).
        sizes: [B, K] patches of each region, the seed included, in [1, N].
        draws: [B, K, N] in [0, 1), independent.

    Returns:
        [B, K, N] bool.
    """
    order = draws.copy()
    np.put_along_axis(order, seeds[..., None], -1.0, axis=-1)
    ranks = np.empty(order.shape, np.int64)
    np.put_along_axis(ranks, order.argsort(axis=-1, kind="stable"), np.arange(order.shape[-1]), axis=-1)
    return ranks < sizes[..., None]


def blob_regions(
    seeds: NDArray[np.int64], sizes: NDArray[np.int64], draws: NDArray[np.float64], *, grid: int
) -> NDArray[np.bool_]:
    """Connected regions that grow from the seed, one uniformly drawn neighbour at a time (Eden's model).

    A smaller region is part of a larger one of the same draws.

    Args:
        seeds: [B, K] in [0, N), N = grid².
        sizes: [B, K] patches of each region, in [1, N].
        draws: [B, K, N] in [0, 1), independent.
        grid: patches along a side.

    Returns:
        [B, K, N] bool; each is connected along rows and columns.
    """
    blobs = np.zeros((seeds.size, grid * grid), np.bool_)
    grow_blobs(blobs, seeds.ravel(), sizes.ravel(), draws.reshape(seeds.size, -1), grid)
    return blobs.reshape(*seeds.shape, grid * grid)


@compiled
def grow_blobs(blobs, seeds, sizes, draws, grid):  # type: ignore[no-untyped-def]
    """Fill all-False `blobs` [R, N] bool; seeds and sizes [R] int64, draws [R, N] float64."""
    patches = grid * grid
    waiting = np.empty(patches, np.int64)  # patches beside the blob, each once
    met = np.empty(patches, np.bool_)
    for region in range(blobs.shape[0]):
        met[:] = False
        waiting[0] = seeds[region]
        met[seeds[region]] = True
        count = 1
        for taken in range(sizes[region]):
            chosen = int(draws[region, taken] * count)
            patch = waiting[chosen]
            count -= 1
            waiting[chosen] = waiting[count]
            blobs[region, patch] = True
            row, column = patch // grid, patch % grid
            for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                r, c = row + down, column + right
                if 0 <= r < grid and 0 <= c < grid and not met[r * grid + c]:
                    met[r * grid + c] = True
                    waiting[count] = r * grid + c
                    count += 1
