from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.viz.region_figure import RegionPictures, denormalise, draw_regions

pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")


def pictures(valid: tuple[bool, ...] = (True, False)) -> RegionPictures:
    """Two mid-gray samples on a 4 × 4 grid of 16 px patches; the region is the right half, the seed patch 6."""
    right = np.tile(np.array([False, False, True, True]), 4)
    samples = len(valid)
    return RegionPictures(
        reference=np.full((samples, 64, 64, 3), 128, np.uint8),
        global_views=np.full((2, samples, 64, 64, 3), 128, np.uint8),
        region=np.tile(right, (samples, 1)),
        view_regions=np.stack([np.tile(right[::-1], (samples, 1)), np.zeros((samples, 16), np.bool_)]),
        seed=np.full(samples, 6),
        valid=np.array(valid),
        patch_px=16,
    )


def span(mask: NDArray[np.bool_], axis: int) -> tuple[int, int]:
    """First and last line along `axis` that holds much of the mask: the edges of letters are few pixels."""
    lines = np.nonzero(mask.sum(axis=1 - axis) > 20)[0]
    return int(lines[0]), int(lines[-1])


def test_the_picture_shows_region_and_seed_where_they_are(tmp_path: Path) -> None:
    target = draw_regions(pictures((True,)), tmp_path / "deep" / "regions.png")
    drawn = np.asarray(Image.open(target).convert("RGB")).astype(int)
    red = (drawn[..., 0] - drawn[..., 2] > 40) & (drawn[..., 0] - drawn[..., 1] > 40)
    blue = drawn[..., 2] - drawn[..., 0] > 100
    gray = np.abs(drawn - 128).max(axis=-1) < 3

    # The reference is the first of three panels from top to bottom: gray on the left, red on the right.
    height = drawn.shape[0]
    top, middle, bottom = (slice(round(height * i / 3), round(height * (i + 1) / 3)) for i in range(3))
    (left, gray_end), (red_start, right) = span(gray[top], 1), span(red[top], 1)
    assert gray_end == pytest.approx((left + right) / 2, abs=4)  # a pale edge beside the outline
    assert red_start == pytest.approx((left + right) / 2, abs=3)
    # Patch 6 of a 4 × 4 grid: row 1, column 2, so its centre is at (2.5/4, 1.5/4) of the panel.
    first, last = span(gray[top], 0)
    blue_rows, blue_columns = np.nonzero(blue[top])
    assert np.mean(blue_columns) == pytest.approx(left + 2.5 / 4 * (right - left), abs=2)
    assert np.mean(blue_rows) == pytest.approx(first + 1.5 / 4 * (last - first), abs=2)
    # View 1 has the left half, view 2 nothing; the seed belongs to the reference alone.
    assert span(red[middle], 1)[1] == pytest.approx(span(gray[middle], 1)[0], abs=3)
    assert red[bottom].sum() == 0
    assert blue[middle].sum() == blue[bottom].sum() == 0


def test_a_column_per_sample_with_counts_and_validity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **_: titles.append(text))
    draw_regions(pictures(), tmp_path / "regions.png", title="step 7")
    assert titles == ["8 patches · valid", "8 patches", "0 patches", "8 patches · not valid", "8 patches", "0 patches"]


def test_denormalise_undoes_the_loader() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    normalised = (pixels / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    images = torch.from_numpy(normalised).movedim(-1, -3).float()
    np.testing.assert_array_equal(denormalise(images), pixels)
    assert denormalise(images[None] * 100).shape == (1, 2, 5, 7, 3)  # far outside of [0, 1] is clipped, not wrapped
