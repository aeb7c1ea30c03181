"""The renderer written to be read: float64 NumPy, one view at a time, rounded to 8 bits where an image would be.

`CpuRenderer` and the DALI graph are held against it. A resize is a matrix per axis, and so is a blur.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from crisp.batch import Batch
from crisp.config import Interpolation, ViewsConfig
from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.pipelines.decode import Decoder
from crisp.pipelines.source import Work

Array = NDArray[np.float64]


def resize_matrix(length: int, out: int, interpolation: Interpolation) -> Array:
    """Antialiased resize of one axis, [out, length]: the filter is stretched by the reduction, as PIL does.

    Taps beyond the window are dropped and the rest rescaled to sum to 1.
    """
    scale = length / out
    stretch = max(scale, 1.0)
    centre = (np.arange(out)[:, None] + 0.5) * scale
    distance = np.abs(np.arange(length)[None] + 0.5 - centre) / stretch
    if interpolation == "bilinear":
        weights = np.maximum(0, 1 - distance)
    else:  # cubic convolution with a = −.5 (Catmull–Rom)
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def blur_matrix(length: int, sigma_px: float) -> Array:
    """Gaussian blur of one axis, [length, length]: radius ceil(3σ), the image mirrored about its outermost pixels."""
    radius = int(np.ceil(3 * sigma_px))
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma_px) ** 2)
    kernel /= kernel.sum()
    sources = np.pad(np.arange(length), radius, mode="reflect") if length > 1 else np.zeros(2 * radius + 1, np.int64)
    matrix = np.zeros((length, length))
    for i in range(length):
        np.add.at(matrix[i], sources[i : i + 2 * radius + 1], kernel)
    return matrix


def to_uint8(values: Array) -> NDArray[np.uint8]:
    """Rounded and clipped to 0..255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def render_view_plain(
    pixels: NDArray[np.uint8],
    *,
    crop_px: NDArray[np.int32],
    out_px: int,
    interpolation: Interpolation,
    flip: bool = False,
    blur_sigma_px: float = 0.0,
    color_matrix: NDArray[np.float32] | None = None,
    solarize: bool = False,
) -> NDArray[np.uint8]:
    """One view before normalisation: [h, w, 3] uint8 image → [3, out_px, out_px] uint8. See `Plan` for the draws."""
    x, y, width, height = crop_px
    window = pixels[y : y + height, x : x + width].transpose(2, 0, 1).astype(np.float64)  # [3, height, width]
    rows = resize_matrix(int(height), out_px, interpolation)
    columns = resize_matrix(int(width), out_px, interpolation)
    view = to_uint8(rows @ window @ columns.T)
    if flip:
        view = view[:, :, ::-1]
    if blur_sigma_px > 0:
        blur = blur_matrix(out_px, float(blur_sigma_px))
        view = to_uint8(blur @ view.astype(np.float64) @ blur.T)
    if color_matrix is not None:
        matrix = color_matrix.astype(np.float64)
        view = to_uint8(np.tensordot(matrix[:, :3], view.astype(np.float64), 1) + matrix[:, 3, None, None])
    if solarize:
        view = np.where(view >= 128, 255 - view, view)
    return view


def normalize(view: NDArray[np.uint8]) -> Array:
    """[3, h, w] pixel values → ImageNet-normalised float64."""
    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (view / 255 - mean) / std


def render_plain(work: Work, views: ViewsConfig) -> Batch:
    """The batch of `work`, images in float64."""
    plan, decode = work.plan, Decoder()
    references, rendered = [], []
    for b, data in enumerate(work.encoded):
        pixels = decode(data)
        whole = np.array([0, 0, pixels.shape[1], pixels.shape[0]], np.int32)
        references.append(
            normalize(
                render_view_plain(pixels, crop_px=whole, out_px=views.reference_px, interpolation=views.interpolation)
            )
        )
        rendered.append(
            [
                normalize(
                    render_view_plain(
                        pixels,
                        crop_px=plan.crop_px[b, v],
                        out_px=out_px,
                        interpolation=views.interpolation,
                        flip=bool(plan.flip[b, v]),
                        blur_sigma_px=float(plan.blur_sigma_px[b, v]),
                        color_matrix=plan.color_matrix[b, v],
                        solarize=bool(plan.solarize[b, v]),
                    )
                )
                for v, out_px in enumerate(views.view_px)
            ]
        )

    def stack(first: int, last: int, side: int) -> torch.Tensor:  # [V, B, 3, side, side]
        images = [[sample[v] for sample in rendered] for v in range(first, last)]
        return torch.from_numpy(np.array(images).reshape(last - first, len(rendered), 3, side, side))

    return Batch(
        reference=torch.from_numpy(np.stack(references)),
        global_views=stack(0, 2, views.global_px),
        local_views=stack(2, views.views, views.local_px),
        view_from_reference=torch.from_numpy(plan.view_from_reference),
        patch_masks=torch.from_numpy(plan.patch_masks),
        region_seed=torch.from_numpy(plan.region_seed),
        label=torch.from_numpy(work.label),
        sample_id=torch.from_numpy(plan.sample_id),
    )
