"""Measures against their definitions written plainly, and where the answer is known."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.evals.region_quality.measures import MEASURES, UNDEFINED, measure, seed_segments, segments_of
from crisp.evals.segmentation.patches import mode_labels, patch_pixels
from tests.evals.region_quality import plain

GRID, PATCH_PX = 4, 4
SIDE = GRID * PATCH_PX


def measured(
    labels: NDArray[np.uint8], regions: Tensor, seeds: Tensor, *, ignored: tuple[int, ...], tolerance_px: int
) -> list[list[dict[str, float]]]:
    """Labels [B, H, W], regions [B, K, N], seeds [B, K] → measures by name for each."""
    cut = np.stack([patch_pixels(image, PATCH_PX) for image in labels])
    modes = np.stack([mode_labels(image) for image in cut])
    segments = segments_of(torch.from_numpy(cut), torch.from_numpy(modes), ignored=ignored)
    truth = seed_segments(segments, seeds, tolerance_px=tolerance_px)
    values = measure(regions, truth, segments, patch_px=PATCH_PX, tolerance_px=tolerance_px)
    return [[dict(zip(MEASURES, row.tolist(), strict=True)) for row in image] for image in values]


def blocky_labels(rng: np.random.Generator, ids: list[int]) -> NDArray[np.uint8]:
    """Labels [SIDE, SIDE] in blobs whose edges cut patches."""
    coarse = rng.choice(ids, (6, 6))
    return np.kron(coarse, np.ones((3, 3), np.uint8)).astype(np.uint8)[:SIDE, :SIDE]


@pytest.mark.parametrize("tolerance_px", [0, 1, 2])
def test_as_the_definitions_say(tolerance_px: int) -> None:
    rng = np.random.default_rng(tolerance_px)
    images, each, ignored = 4, 5, (9, 255)
    labels = np.stack([blocky_labels(rng, [0, 1, 2, 9, 255][: 2 + i]) for i in range(images)])
    regions = rng.random((images, each, GRID**2)) < rng.random((images, each, 1))
    seeds = rng.integers(0, GRID**2, (images, each))
    np.put_along_axis(regions, seeds[..., None], True, axis=-1)
    regions[0, 0] = True  # has no boundary
    found = measured(
        labels, torch.from_numpy(regions), torch.from_numpy(seeds), ignored=ignored, tolerance_px=tolerance_px
    )
    undefined = 0
    for image in range(images):
        for k in range(each):
            region = set(np.flatnonzero(regions[image, k]).tolist())
            expected = plain.measures(
                labels[image], region, int(seeds[image, k]),
                patch_px=PATCH_PX, ignored=ignored, tolerance_px=tolerance_px,
            )  # fmt: skip
            undefined += sum(value is None for value in expected.values())
            wanted = {name: UNDEFINED if value is None else value for name, value in expected.items()}
            assert found[image][k] == pytest.approx(wanted, abs=1e-6)
    assert undefined >= 1


def one(labels: NDArray[np.uint8], region: set[int], seed: int, **options: Any) -> dict[str, float]:
    mask = torch.zeros(1, 1, GRID**2, dtype=torch.bool)
    mask[0, 0, list(region)] = True
    return measured(labels[None], mask, torch.tensor([[seed]]), **{"ignored": (255,), "tolerance_px": 2, **options})[0][
        0
    ]


def test_a_segment_of_whole_patches_is_met_exactly() -> None:
    labels = np.zeros((SIDE, SIDE), np.uint8)
    labels[:8, :8] = 3
    found = one(labels, {0, 1, 4, 5}, 0, tolerance_px=0)
    assert all(found[name] == 1 for name in MEASURES if name != "size")
    assert found["size"] == 4 / 16


def test_an_edge_that_cuts_patches_costs_pixels_alone() -> None:
    labels = np.zeros((SIDE, SIDE), np.uint8)
    labels[:, :7] = 3  # 1.75 patches wide: two columns of patches are labelled 3
    region = {row * GRID + column for row in range(GRID) for column in (0, 1)}
    found = one(labels, region, 0)
    assert (found["purity"], found["overlap"]) == (1, 1)
    assert found["purity-px"] == 7 / 8
    assert found["overlap-px"] == 7 / 8
    assert found["boundary-recall"] == 1  # one pixel off
    assert one(labels, region, 0, tolerance_px=0)["boundary-recall"] == 0


def test_the_whole_image_has_the_segments_share() -> None:
    labels = np.zeros((SIDE, SIDE), np.uint8)
    labels[:4] = 7
    found = one(labels, set(range(GRID**2)), 0)
    assert found["purity"] == found["purity-px"] == 1 / 4
    assert found["overlap"] == 3 / 4  # with the other segment
    assert found["boundary-recall"] == 0
    assert found["boundary-precision"] == UNDEFINED
    assert found["size"] == 1


def test_a_seed_without_a_segment_has_a_size_alone() -> None:
    labels = np.zeros((SIDE, SIDE), np.uint8)
    labels[:4, :4] = 255
    found = one(labels, {0, 1}, 0)
    assert [found[name] for name in MEASURES[:-1]] == [UNDEFINED] * 6
    assert found["size"] == 2 / 16
    assert one(labels, {0, 1}, 1)["purity"] == 1  # the ignored patch is left out
