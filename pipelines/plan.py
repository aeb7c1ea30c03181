"""Every random draw of a sample, as a pure function of (seed, epoch, sample).

A view's draws have their own fixed addresses (`crisp.philox`): nothing depends on the batch, the rank, the world or
how many other views there are, so any sample can be rendered again alone.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crisp.config import ViewsConfig
from crisp.geometry import compose, crop_affine, invert, resize_affine
from crisp.jit import compiled
from crisp.masking import patch_masks
from crisp.philox import Stream, uniform4, uniforms, word

Ints = NDArray[np.int64]

_CROP = word(Stream.CROP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All draws of B samples: what a renderer needs to make V = 2 + L views, and what the model needs beside them.

    Blur comes before colour (both are linear, so they commute but for rounding and clipping); then solarise,
    then normalise.
    """

    sample_id: NDArray[np.int64]
    """[B]"""
    crop_px: NDArray[np.int32]
    """[B, V, 4] (x, y, width, height) of each view's window in image pixels"""
    flip: NDArray[np.bool_]
    """[B, V]"""
    color_factors: NDArray[np.float32]
    """[B, V, 4] brightness, contrast, saturation (0: grayscale), hue in degrees, as DALI's color_twist takes them"""
    color_matrix: NDArray[np.float32]
    """[B, V, 3, 4] those factors as one matrix on (r, g, b, 1) in 0..255"""
    blur_sigma_px: NDArray[np.float32]
    """[B, V]; 0: no blur"""
    solarize: NDArray[np.bool_]
    """[B, V]"""
    view_from_reference: NDArray[np.float32]
    """[V, B, 2, 3]"""
    patch_masks: NDArray[np.bool_]
    """[2, B, n]"""
    region_seed: NDArray[np.int64]
    """[B, K]"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Appearance:
    """What a view looks like beside its geometry; [B, V] each, as in `Plan`."""

    flip: NDArray[np.bool_]
    color_factors: NDArray[np.float32]
    blur_sigma_px: NDArray[np.float32]
    solarize: NDArray[np.bool_]


def make_plan(
    views: ViewsConfig, *, seed: int, epoch: int, sample_id: Ints, height_px: ArrayLike, width_px: ArrayLike
) -> Plan:
    """The draws of B samples.

    Args:
        views: the recipe.
        seed: of the run.
        epoch: from 0.
        sample_id: [B].
        height_px: [B] of each image, in the orientation that is rendered.
        width_px: [B].
    """
    sample_id = np.asarray(sample_id, np.int64)
    height, width = np.asarray(height_px, np.int64), np.asarray(width_px, np.int64)
    crop_px = crop_windows(views, seed=seed, epoch=epoch, sample_id=sample_id, height_px=height, width_px=width)
    look = appearance(views, seed=seed, epoch=epoch, sample_id=sample_id)
    return Plan(
        sample_id=sample_id,
        crop_px=crop_px,
        flip=look.flip,
        color_factors=look.color_factors,
        color_matrix=color_matrix(look.color_factors),
        blur_sigma_px=look.blur_sigma_px,
        solarize=look.solarize,
        view_from_reference=affines(views, crop_px=crop_px, flip=look.flip, height_px=height, width_px=width),
        patch_masks=patch_masks(views, seed=seed, epoch=epoch, sample_id=sample_id),
        region_seed=region_seeds(
            views, seed=seed, epoch=epoch, sample_id=sample_id, crop_px=crop_px, height_px=height, width_px=width
        ),
    )


def put_sample(plan: Plan, b: int, other: Plan) -> None:
    """Overwrite sample `b` of a plan by the only sample of another."""
    for name in ("sample_id", "crop_px", "flip", "color_factors", "color_matrix", "blur_sigma_px", "solarize"):
        getattr(plan, name)[b] = getattr(other, name)[0]
    plan.region_seed[b] = other.region_seed[0]
    plan.view_from_reference[:, b] = other.view_from_reference[:, 0]
    plan.patch_masks[:, b] = other.patch_masks[:, 0]


def crop_windows(
    views: ViewsConfig, *, seed: int, epoch: int, sample_id: Ints, height_px: Ints, width_px: Ints
) -> NDArray[np.int32]:
    """Windows as torchvision's RandomResizedCrop draws them: ten tries, then the largest central one in the aspects.

    Returns:
        [B, V, 4] int32 (x, y, width, height) in image pixels, inside the image, no side below 1.
    """
    low, high = np.array([views.global_scale] * 2 + [views.local_scale] * views.local_views).T
    central = central_windows(height_px, width_px, views.aspect)  # [B, 4]
    windows = np.repeat(central[:, None], views.views, axis=1)
    draw_windows(
        windows,
        word(seed),
        word(epoch),
        sample_id.astype(np.uint64),
        height_px,
        width_px,
        low,
        high,
        math.log(views.aspect[0]),
        math.log(views.aspect[1]),
    )
    return windows


@compiled
def draw_windows(  # type: ignore[no-untyped-def]
    windows, seed, epoch, sample_id, height_px, width_px, low_scale, high_scale, low_log_aspect, high_log_aspect
):
    """Overwrite `windows` [B, V, 4] int32 by the first of ten that fits; where none does, it stays as it was.

    seed, epoch and sample_id [B] are uint64, the sizes [B] int64, the scales [V] float64.
    """
    for b in range(windows.shape[0]):
        height, width = height_px[b], width_px[b]
        for view in range(windows.shape[1]):
            for attempt in range(10):
                area_draw, aspect_draw, x_draw, y_draw = uniform4(
                    seed, epoch, np.uint64(attempt), np.uint64(view), sample_id[b], _CROP
                )
                area = (low_scale[view] + area_draw * (high_scale[view] - low_scale[view])) * (height * width)
                aspect = math.exp(low_log_aspect + aspect_draw * (high_log_aspect - low_log_aspect))
                w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if 0 < w <= width and 0 < h <= height:
                    window = windows[b, view]
                    window[0], window[1] = int(x_draw * (width - w + 1)), int(y_draw * (height - h + 1))
                    window[2], window[3] = w, h
                    break


def central_windows(height_px: Ints, width_px: Ints, aspect: tuple[float, float]) -> NDArray[np.int32]:
    """The largest central window of an aspect ratio within bounds: sizes [B] → [B, 4] int32 (x, y, width, height)."""
    low, high = aspect
    width = np.minimum(width_px, np.maximum(1, np.rint(height_px * high)))
    height = np.minimum(height_px, np.maximum(1, np.rint(width_px / low)))
    return np.stack([(width_px - width) // 2, (height_px - height) // 2, width, height], axis=-1).astype(np.int32)


def appearance(views: ViewsConfig, *, seed: int, epoch: int, sample_id: Ints) -> Appearance:
    """Flip, colour, blur and solarise of every view.

    Colour factors are drawn as torchvision's ColorJitter draws them: U(max(0, 1 − s), 1 + s) for brightness, contrast
    and saturation, U(−h, h) turns for hue.
    """
    draws = uniforms(
        Stream.APPEARANCE, seed=seed, epoch=epoch, sample=sample_id[:, None], lane=np.arange(views.views), blocks=3
    )  # [B, V, 12]; the last two are spare
    flip, jitter, _, _, _, _, gray, blur, sigma, solarize = np.moveaxis(draws[..., :10], -1, 0)

    strength = np.array(views.jitter)
    high = np.array([1.0, 1.0, 1.0, 0.0]) + strength
    low = np.array([1.0, 1.0, 1.0, 0.0]) - strength
    low[:3] = np.maximum(low[:3], 0)
    factors = (low + draws[..., 2:6] * (high - low)) * (1, 1, 1, 360)
    factors = np.where((jitter < views.jitter_probability)[..., None], factors, (1, 1, 1, 0))
    factors[..., 2] *= gray >= views.grayscale_probability

    group = [0, 1] + [2] * views.local_views
    low_sigma, high_sigma = views.blur_sigma_px
    blurred = blur < np.array(views.blur_probability)[group]
    return Appearance(
        flip=flip < views.flip_probability,
        color_factors=factors.astype(np.float32),
        blur_sigma_px=np.where(blurred, low_sigma + sigma * (high_sigma - low_sigma), 0).astype(np.float32),
        solarize=solarize < np.array(views.solarize_probability)[group],
    )


# As DALI 2.4 has it (older releases round the inverse, too). Inverting rounded numbers leaves grays .3 % blue.
_YIQ_FROM_RGB = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_RGB_FROM_YIQ = np.linalg.inv(_YIQ_FROM_RGB)


def color_matrix(color_factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """DALI's color_twist as one matrix: saturate and turn in YIQ, contrast about 128, then brightness over all.

    Args:
        color_factors: [..., 4] brightness, contrast, saturation, hue in degrees.

    Returns:
        [..., 3, 4] float32 on (r, g, b, 1) in 0..255; the result is to be clipped to that range.
    """
    brightness, contrast, saturation, hue = np.moveaxis(color_factors.astype(np.float64), -1, 0)
    along, across = saturation * np.cos(np.deg2rad(hue)), saturation * np.sin(np.deg2rad(hue))
    saturated_and_turned = np.zeros((*hue.shape, 3, 3))  # acts on (y, i, q)
    saturated_and_turned[..., 0, 0] = 1
    saturated_and_turned[..., 1, 1] = saturated_and_turned[..., 2, 2] = along
    saturated_and_turned[..., 1, 2], saturated_and_turned[..., 2, 1] = across, -across  # by −hue

    matrix = np.empty((*hue.shape, 3, 4), np.float32)
    linear = _RGB_FROM_YIQ @ saturated_and_turned @ _YIQ_FROM_RGB
    matrix[..., :3] = (brightness * contrast)[..., None, None] * linear
    matrix[..., 3] = (brightness * (128 - 128 * contrast))[..., None]
    return matrix


def affines(
    views: ViewsConfig, *, crop_px: NDArray[np.int32], flip: NDArray[np.bool_], height_px: Ints, width_px: Ints
) -> NDArray[np.float32]:
    """`view_from_reference` of crops [B, V, 4] and flips [B, V] → [V, B, 2, 3] float32, as the model takes them."""
    view_from_image = crop_affine(crop_px.astype(np.float64), np.array(views.view_px), flip)  # [B, V, 2, 3]
    reference_from_image = resize_affine(height_px.astype(np.float64), width_px.astype(np.float64), views.reference_px)
    image_from_reference = invert(reference_from_image)  # [B, 2, 3]
    view_from_reference = compose(view_from_image, image_from_reference[:, None])
    return np.ascontiguousarray(np.moveaxis(view_from_reference, 1, 0), np.float32)


def region_seeds(
    views: ViewsConfig,
    *,
    seed: int,
    epoch: int,
    sample_id: Ints,
    crop_px: NDArray[np.int32],
    height_px: Ints,
    width_px: Ints,
) -> Ints:
    """K reference patches per image, drawn independently (they may coincide).

    With the policy "visible" they are uniform over the patches whose centre both global crops show, or over all where
    there is none.

    Returns:
        [B, K] int64 in [0, reference_grid²), row by row.
    """
    B, K, grid = len(sample_id), views.seeds_per_image, views.reference_grid
    draws = uniforms(Stream.SEED, seed=seed, epoch=epoch, sample=sample_id, blocks=-(-K // 4))[:, :K]
    if views.seed_policy == "uniform":
        return (draws * grid**2).astype(np.int64)

    centres = (np.arange(grid) + 0.5) / grid
    x, y = centres * width_px[:, None], centres * height_px[:, None]  # [B, grid] in image pixels
    left, top, crop_w, crop_h = np.moveaxis(crop_px[:, :2, :, None], 2, 0)  # [B, 2, 1]
    columns = ((left <= x[:, None]) & (x[:, None] < left + crop_w)).all(axis=1)  # [B, grid]
    rows = ((top <= y[:, None]) & (y[:, None] < top + crop_h)).all(axis=1)
    visible = (rows[:, :, None] & columns[:, None, :]).reshape(B, grid**2)
    visible |= ~visible.any(axis=1, keepdims=True)
    rank = np.cumsum(visible, axis=1)  # the i-th visible patch is the first whose rank exceeds i
    chosen = np.floor(draws * rank[:, -1:])  # [B, K]
    return np.argmax(rank[:, None, :] > chosen[..., None], axis=-1)
