"""Random regions: of the size that is asked for, around the seed, as the plain forms draw them."""

import numpy as np
from numpy.typing import NDArray

from crisp.evals.region_quality.random_regions import blob_regions, grow_blobs, scattered_regions
from tests.evals.region_quality import plain

GRID = 6
N = GRID * GRID


def drawn(images: int = 3, each: int = 8) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, N + 1, (images, each))
    sizes[0, :3] = (1, 2, N)
    return rng.integers(0, N, (images, each)), sizes, rng.random((images, each, N))


def members(regions: NDArray[np.bool_]) -> list[set[int]]:
    return [set(np.flatnonzero(region).tolist()) for region in regions.reshape(-1, N)]


def test_as_the_plain_forms() -> None:
    seeds, sizes, draws = drawn()
    cases = list(zip(seeds.ravel().tolist(), sizes.ravel().tolist(), draws.reshape(-1, N).tolist(), strict=True))
    blobs = members(blob_regions(seeds, sizes, draws, grid=GRID))
    assert blobs == [plain.blob(seed, size, own, GRID) for seed, size, own in cases]
    assert members(scattered_regions(seeds, sizes, draws)) == [plain.scattered(*case) for case in cases]


def test_size_seed_and_connection() -> None:
    seeds, sizes, draws = drawn()
    for regions, connected in (
        (blob_regions(seeds, sizes, draws, grid=GRID), True),
        (scattered_regions(seeds, sizes, draws), False),
    ):
        assert (regions.sum(-1) == sizes).all()
        assert np.take_along_axis(regions, seeds[..., None], axis=-1).all()
        assert all(plain.is_connected(region, GRID) for region in members(regions)) == connected


def test_a_larger_blob_holds_the_smaller_one() -> None:
    seeds, _, draws = drawn()
    small, large = (blob_regions(seeds, np.full_like(seeds, size), draws, grid=GRID) for size in (5, 11))
    assert (large | ~small).all()


def test_compiled_as_in_python() -> None:
    seeds, sizes, draws = drawn(1, 4)
    compiled, plain_python = (np.zeros((4, N), np.bool_) for _ in range(2))
    grow_blobs(compiled, seeds[0], sizes[0], draws[0], GRID)
    grow_blobs.py_func(plain_python, seeds[0], sizes[0], draws[0], GRID)
    assert (compiled == plain_python).all()
