"""The renderer that the others are held against is itself held against the geometry and against PIL."""

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crisp.pipelines.decode import Decoder
from crisp.pipelines.plain import blur_matrix, render_plain, render_view_plain


def test_ramps(ramp_work: Any) -> None:
    ramp_work.check(render_plain(ramp_work.work, ramp_work.views))


def test_the_ramp_test_sees_a_tenth_of_a_pixel(ramp_work: Any) -> None:
    batch = render_plain(ramp_work.work, ramp_work.views)
    for row in (0, 1):
        affine = batch.view_from_reference.clone()
        affine[..., row, 2] += 0.1
        with pytest.raises(AssertionError, match="position bias"):
            ramp_work.check(dataclasses.replace(batch, view_from_reference=affine))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_px", [(0, 0, 301, 177), (17, 23, 120, 33), (290, 170, 11, 7), (5, 5, 1, 1)])
def test_resize_is_pils(interpolation: str, crop_px: tuple[int, int, int, int]) -> None:
    # mid-range, since PIL clips between its two passes as well as after them
    pixels = np.random.default_rng(1).integers(80, 176, (177, 301, 3), dtype=np.uint8)
    x, y, width, height = crop_px
    ours = render_view_plain(
        pixels,
        crop_px=np.array(crop_px, np.int32),
        out_px=96,
        interpolation=interpolation,  # type: ignore[arg-type]
    )
    theirs = (
        Image.fromarray(pixels)
        .crop((x, y, x + width, y + height))
        .resize((96, 96), Image.Resampling[interpolation.upper()])
    )
    difference = ours.astype(int) - np.asarray(theirs).transpose(2, 0, 1)
    # and rounds there
    assert np.abs(difference).max() <= 2
    assert np.abs(difference).mean() < 0.3


def test_blur_keeps_the_mean_and_mirrors_at_the_border() -> None:
    matrix = blur_matrix(9, 1.0)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    kernel = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    kernel /= kernel.sum()
    # pixel 0 sees pixel 1 on both sides, and itself once
    np.testing.assert_allclose(matrix[0, :4], [kernel[3], 2 * kernel[4], 2 * kernel[5], 2 * kernel[6]])


def test_exif_rotation_is_ignored() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for options in ({}, {"exif": exif}):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", **options)
        files.append(Decoder()(memoryview(buffer.getvalue())).copy())
    assert files[1].shape == (16, 32, 3)
    np.testing.assert_array_equal(*files)
