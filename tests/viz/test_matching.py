"""Correspondence in numbers: against loops, and against positions that are known."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from crisp.config import ViewsConfig
from crisp.geometry import apply, compose, crop_affine, invert, patch_centres
from crisp.models.frozen import BlockTokens, FrozenBackbone, FrozenModel
from crisp.viz.augmented import render_views, renormalised
from crisp.viz.correspondence import find_match
from crisp.viz.inputs import Images
from crisp.viz.matching import (
    Truth,
    best_matches,
    match_accuracy,
    most_attended,
    nearest_resize,
    true_matches,
)

GRID, PATCH_PX = 14, 16


def crops(count: int) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """view_from_image of two views of a 500 × 375 image, 40 to 100 % of it, flipped or not."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        pair = []
        for _ in range(2):
            share, aspect = rng.uniform(0.4, 1), np.exp(rng.uniform(*np.log([3 / 4, 4 / 3])))
            width, height = np.minimum(np.sqrt(share * 500 * 375 * np.array([aspect, 1 / aspect])), [500, 375])
            x, y = rng.uniform(0, [500 - width + 1e-9, 375 - height + 1e-9])
            pair.append(crop_affine(np.array([x, y, width, height]), 224, flip=bool(rng.integers(2))))
        yield pair[0], pair[1]


def test_the_best_match_has_the_largest_dot_product_and_the_first_of_equals() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(20, 8)), rng.normal(size=(30, 8))
    second[7] *= 100  # longer, so it wins where it points the right way: no l2-normalisation
    expected = [max(range(30), key=lambda j, i=i: float(first[i] @ second[j])) for i in range(20)]  # type: ignore[misc]
    assert best_matches(first, second).tolist() == expected
    assert 7 in expected
    assert best_matches(np.ones((1, 2)), np.ones((3, 2))).tolist() == [0]


@pytest.mark.parametrize(("rows", "grid"), [(28, 14), (14, 14), (16, 14), (14, 28)])
def test_attention_is_resized_to_the_nearest(rows: int, grid: int) -> None:
    attention = np.random.default_rng(0).random((3, rows, rows), np.float32)
    expected = F.interpolate(torch.tensor(attention)[None], size=(grid, grid), mode="nearest")[0]
    np.testing.assert_array_equal(nearest_resize(attention, grid), expected.numpy())
    if rows == 2 * grid:
        np.testing.assert_array_equal(nearest_resize(attention, grid), attention[:, ::2, ::2])


def test_the_most_attended_are_those_of_the_mean_over_heads() -> None:
    attention = np.array([[0.5, 0.0, 0.2, 0.2, 0.0], [0.0, 0.2, 0.2, 0.3, 0.2]])  # means .25 .1 .2 .25 .1
    assert most_attended(attention, 3).tolist() == [0, 3, 2]
    assert most_attended(attention, 4).tolist() == [0, 3, 2, 1], "the first of equals"
    among = np.array([False, True, True, False, False])
    assert most_attended(attention, 4, among=among).tolist() == [2, 1], "none outside the overlap, fewer if it is small"


def test_true_matches_are_the_nearest_in_the_image() -> None:
    """By brute force from the distances of all centres in image coordinates, as iBOT measures them."""
    centres, overlapping = patch_centres(GRID, PATCH_PX), 0
    for first_from_image, second_from_image in crops(40):
        truth = true_matches(compose(second_from_image, invert(first_from_image)), grid=GRID, patch_px=PATCH_PX)
        ones = apply(invert(first_from_image), centres)
        others = apply(invert(second_from_image), centres)
        inside = apply(second_from_image, ones)
        np.testing.assert_array_equal(truth.overlap, ((inside >= 0) & (inside < 224)).all(axis=1))
        # Each axis by its own scale: nearest is then nearest along each, whatever the crop's aspect.
        distance = (((ones[:, None] - others[None]) / [500, 375]) ** 2).sum(-1)
        np.testing.assert_array_equal(truth.nearest[truth.overlap], distance.argmin(axis=1)[truth.overlap])
        assert (truth.nearest[~truth.overlap] == -1).all()
        overlapping += int(truth.overlap.sum())
    assert 0.3 < overlapping / (40 * GRID**2) < 0.9


def test_features_that_are_the_true_position_are_always_right() -> None:
    """⟨(2p, −1), (q, |q|²)⟩ = |p|² − |p − q|²: the largest dot product is the nearest place."""
    centres = patch_centres(GRID, PATCH_PX)
    for first_from_image, second_from_image in crops(20):
        truth = true_matches(compose(second_from_image, invert(first_from_image)), grid=GRID, patch_px=PATCH_PX)
        p, q = (apply(invert(view), centres) for view in (first_from_image, second_from_image))
        first = np.concatenate([2 * p, -np.ones((len(p), 1))], axis=1)
        second = np.concatenate([q, (q**2).sum(1, keepdims=True)], axis=1)
        matches = best_matches(first, second)
        assert match_accuracy(matches, truth) == 1
        wrong = matches.copy()
        one = np.flatnonzero(truth.overlap)[0]
        wrong[one] = (wrong[one] + 1) % len(q)
        assert match_accuracy(wrong, truth) == pytest.approx(1 - 1 / truth.overlap.sum())


def test_views_that_share_nothing_have_no_accuracy() -> None:
    truth = true_matches(np.array([[1.0, 0, 224], [0, 1.0, 0]]), grid=GRID, patch_px=PATCH_PX)
    assert not truth.overlap.any()
    assert match_accuracy(np.zeros(GRID**2, np.int64), truth) is None
    assert match_accuracy(np.arange(4), Truth(overlap=np.ones(4, np.bool_), nearest=np.arange(4))) == 1


class Colours(FrozenBackbone):
    """Sees the mean colour of each patch, as (2c, −1) or (c, |c|²) by turns; attends to the red ones."""

    dim, depth, patch_px, native_px = 4, 1, PATCH_PX, 224
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        colours = F.avg_pool2d(images.double(), PATCH_PX).flatten(2).transpose(1, 2)
        self.calls += 1
        if self.calls % 2:
            patches = torch.cat([2 * colours, -torch.ones_like(colours[..., :1])], dim=-1)
        else:
            patches = torch.cat([colours, (colours**2).sum(-1, keepdim=True)], dim=-1)
        return [BlockTokens(cls=patches[:, 0], patches=patches)]

    def cls_attention(self, images: Tensor) -> Tensor:
        red = F.avg_pool2d(images[:, :1], PATCH_PX).flatten(2)
        return torch.cat([red, red], dim=1)


def test_a_backbone_that_sees_positions_matches_rendered_views(tmp_path: Path) -> None:
    """Through renderer, affines and matching: the image's colours are its coordinates, and nothing changes colours."""
    y, x = np.mgrid[0:300, 0:420]
    ramp = np.stack([x / 420, y / 300, np.zeros_like(x)], axis=-1)
    path = tmp_path / "ramp.png"
    Image.fromarray((ramp * 255).round().astype(np.uint8)).save(path)
    views = ViewsConfig(
        local_views=0, global_scale=(0.4, 1.0), jitter_probability=0, grayscale_probability=0,
        blur_probability=(0, 0, 0), solarize_probability=(0, 0, 0), mask_probability=0,
    )  # fmt: skip
    right = total = 0.0
    for seed in range(6):
        batch = render_views(Images([str(path)]), [0], views, seed=seed, epoch=0)
        affine = compose(batch.view_from_reference[1, 0].numpy(), invert(batch.view_from_reference[0, 0].numpy()))
        truth = true_matches(affine, grid=GRID, patch_px=PATCH_PX)
        backbone = Colours()
        model = FrozenModel(backbone=backbone, name="colours", source="", fingerprint="", account="")
        one, two = renormalised(batch.global_views[:, 0], backbone, torch.device("cpu")).split(1)
        assert one.min() >= 0 and one.max() <= 1.001  # noqa: PT018
        patches_only = Colours.cls_attention(backbone, one)[0].mean(0).numpy()
        backbone.calls = 0
        match = find_match(model, _fixed(), (one, two), one, top=12, truth=truth)
        assert len(match.patches) == 12
        expected = np.where(truth.overlap, patches_only, -1)
        assert set(match.patches.tolist()) == set(np.argsort(-expected, kind="stable")[:12].tolist())
        assert match.accuracy is not None
        right, total = right + match.accuracy, total + 1
    # 8-bit colours round a place to a pixel or two, so a patch whose centre lies on an edge may go to its neighbour.
    assert right / total > 0.93


def _fixed() -> FrozenModel:
    return FrozenModel(backbone=Colours(), name="fixed", source="", fingerprint="", account="")
