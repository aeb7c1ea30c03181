"""What the tests of both renderers share: plans made by hand, odd image files, and the ramp test.

The ramp test. A ramp is an image whose pixel value is a linear function of its coordinates, so a rendered view
must show, at each of its pixel centres, the value that the affine says: `invert(view_from_image)` there. It is
steep along one axis and nearly flat along the other; the slight tilt spreads rounding to 8 bits over all phases,
so that averages see hundredths of a pixel. Pixels whose filter reaches over the window's edge, where antialiasing
clamps, are left out.
"""

import io
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from crisp.batch import Batch
from crisp.config import Interpolation, ViewsConfig
from crisp.geometry import apply, compose, crop_affine, invert, resize_affine
from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.pipelines.plan import Plan
from crisp.pipelines.source import Work

Array = NDArray[np.float64]

# Encoders by decode path. All but the JPEGs are lossless; CMYK holds the picture in K alone.
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg-420": ("RGB", "JPEG", {"quality": 98, "subsampling": "4:2:0"}),
    "jpeg-444": ("RGB", "JPEG", {"quality": 100, "subsampling": "4:4:4"}),
    "jpeg-progressive": ("RGB", "JPEG", {"quality": 98, "progressive": True}),
    "jpeg-gray": ("L", "JPEG", {"quality": 98}),
    "jpeg-cmyk": ("CMYK", "JPEG", {"quality": 98}),
    "png": ("RGB", "PNG", {}),
    "png-gray": ("L", "PNG", {}),
    "webp": ("RGB", "WEBP", {"lossless": True}),
}


def encode(pixels: NDArray[np.uint8], encoder: str = "jpeg-444", **extra: Any) -> bytes:
    """`pixels` [h, w, 3] as a file of that kind (see `ENCODERS`)."""
    mode, file_format, options = ENCODERS[encoder]
    if mode == "CMYK":
        black = 255 - pixels[..., 0]
        image = Image.fromarray(np.stack([np.zeros_like(black)] * 3 + [black], axis=-1), "CMYK")
    else:
        image = Image.fromarray(pixels).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options, **extra)
    return buffer.getvalue()


def hand_plan(views: ViewsConfig, *, crop_px: NDArray[np.int32], flip: NDArray[np.bool_], size_px: Array) -> Plan:
    """A plan without photometry, blur or masks. `crop_px` [B, V, 4], `flip` [B, V], `size_px` [B, 2] (h, w)."""
    samples = len(crop_px)
    view_from_image = crop_affine(crop_px, np.array(views.view_px), flip)  # [B, V, 2, 3]
    reference_from_image = resize_affine(size_px[:, 0], size_px[:, 1], views.reference_px)  # [B, 2, 3]
    view_from_reference = compose(view_from_image, invert(reference_from_image)[:, None])
    return Plan(
        sample_id=np.arange(100, 100 + samples),
        crop_px=crop_px.astype(np.int32),
        flip=flip.astype(np.bool_),
        color_factors=np.tile(np.array([1, 1, 1, 0], np.float32), (samples, views.views, 1)),
        color_matrix=np.tile(np.eye(3, 4, dtype=np.float32), (samples, views.views, 1, 1)),
        blur_sigma_px=np.zeros((samples, views.views), np.float32),
        solarize=np.zeros((samples, views.views), np.bool_),
        view_from_reference=view_from_reference.swapaxes(0, 1).astype(np.float32),
        patch_masks=np.zeros((2, samples, views.global_grid**2), np.bool_),
        region_seed=np.zeros((samples, views.seeds_per_image), np.int64),
    )


def as_work(encoded: list[bytes], plan: Plan) -> Work:
    return Work(encoded=[memoryview(data) for data in encoded], plan=plan, label=np.arange(len(encoded)))


def levels(images: Any) -> Array:
    """Normalised images [..., 3, H, W] as pixel values 0..255, float64."""
    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.double().numpy() * std + mean) * 255


@dataclass(frozen=True)
class Ramp:
    """An encoded ramp: value(x, y) = base + slope · (x, y), in continuous pixel coordinates."""

    name: str
    encoded: bytes
    height: int
    width: int
    base: float
    slope: Array  # [2] levels per pixel along x and y
    axis: int  # the steep one: 0 for x, 1 for y
    coding_error: Array  # [h, w] decoded by PIL − ideal, in levels

    def value(self, points: Array) -> Array:
        """[..., 2] → [...]"""
        return self.base + points @ self.slope


def make_ramp(encoder: str, height: int, width: int, axis: int) -> Ramp:
    size = np.array([width, height], np.float64)
    span = np.where(np.arange(2) == axis, 205.0, 23.7)
    slope, base = span / size, 13.3
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    ideal = base + slope[0] * x + slope[1] * y
    encoded = encode(np.repeat(np.rint(ideal).astype(np.uint8)[..., None], 3, axis=-1), encoder)
    decoded = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.float64)
    return Ramp(
        name=f"{encoder} {width}x{height} along {'xy'[axis]}",
        encoded=encoded,
        height=height,
        width=width,
        base=base,
        slope=slope,
        axis=axis,
        coding_error=decoded.mean(axis=-1) - ideal,
    )


@dataclass(frozen=True)
class RampWork:
    """One batch of ramps through every decode path, and what its views must show."""

    views: ViewsConfig
    work: Work
    ramps: list[Ramp]

    def check(self, batch: Batch) -> None:
        """Mean error of every view ≤ .6 levels beyond the coding's; position bias of every kind of view ≤ .01 px."""
        bias_px: dict[tuple[str, str, bool], list[float]] = defaultdict(list)
        plan = self.work.plan
        for b, ramp in enumerate(self.ramps):
            reference_from_image = resize_affine(ramp.height, ramp.width, self.views.reference_px)
            whole = np.array([0, 0, ramp.width, ramp.height])
            shown = [("reference", batch.reference[b], reference_from_image, whole, False)]
            for v in range(self.views.views):
                image = batch.global_views[v, b] if v < 2 else batch.local_views[v - 2, b]
                view_from_image = compose(batch.view_from_reference[v, b].double().numpy(), reference_from_image)
                kind = "global" if v < 2 else "local"
                shown.append((kind, image, view_from_image, plan.crop_px[b, v], bool(plan.flip[b, v])))
            for kind, image, view_from_image, crop_px, flip in shown:
                error, bias = _ramp_error(ramp, levels(image), view_from_image, crop_px)
                x, y, width, height = crop_px
                coding = ramp.coding_error[y : y + height, x : x + width]
                assert error <= 0.6 + np.abs(coding).mean(), f"{ramp.name}, {kind}, {crop_px}, flip {flip}: {error}"
                bias_px[kind, "xy"[ramp.axis], flip].append((bias - coding.mean()) / ramp.slope[ramp.axis])
        for group, values in bias_px.items():
            assert abs(np.mean(values)) <= 0.01, (
                f"{group}: position bias {np.mean(values):.4f} px over {len(values)} views"
            )


def _ramp_error(ramp: Ramp, shown: Array, view_from_image: Array, crop_px: NDArray[np.int32]) -> tuple[float, float]:
    """Mean absolute and mean signed difference [3, s, s] − what the affine says, in levels, on the view's interior."""
    side = shown.shape[-1]
    centres = np.arange(side) + 0.5
    points = np.stack(np.meshgrid(centres, centres), axis=-1)
    expected = ramp.value(apply(invert(view_from_image), points.reshape(-1, 2))).reshape(side, side)
    # A cubic filter reaches 2 pixels of the coarser grid; in view pixels that is 2 · max(1, magnification).
    margin_x, margin_y = (int(np.ceil(2 * max(1.0, side / length))) + 1 for length in crop_px[2:])
    difference = (shown - expected)[:, margin_y : side - margin_y, margin_x : side - margin_x]
    return float(np.abs(difference).mean()), float(difference.mean())


# Odd sizes, both orientations, narrower and wider than every view.
SIZES = [(375, 501), (251, 187), (131, 333), (499, 377), (97, 131), (263, 259), (187, 225), (335, 251)]
RAMP_CASES: dict[str, tuple[Interpolation, dict[str, int]]] = {
    "bicubic": ("bicubic", {}),
    "bilinear": ("bilinear", {}),
    "bicubic, patch 14": ("bicubic", {"patch_px": 14, "reference_px": 280, "global_px": 182, "local_px": 98}),
}


@pytest.fixture(scope="session", params=list(RAMP_CASES))
def ramp_work(request: pytest.FixtureRequest) -> RampWork:
    """Ramps along x and y of every kind of file and odd size; windows inside, at the border and whole; flips."""
    interpolation, sides = RAMP_CASES[request.param]
    views = ViewsConfig(interpolation=interpolation, local_views=10, **sides)
    ramps = [
        make_ramp(encoder, *size, axis) for encoder, size in zip(ENCODERS, SIZES, strict=True) for axis in range(2)
    ]
    random = np.random.default_rng(7)
    crops = np.empty((len(ramps), views.views, 4), np.int32)
    for b, ramp in enumerate(ramps):
        for v in range(views.views):
            low = 0.5 if v < 2 else 0.25
            width, height = (int(length * random.uniform(low, 1)) for length in (ramp.width, ramp.height))
            crops[b, v] = (
                random.integers(ramp.width - width + 1),
                random.integers(ramp.height - height + 1),
                width,
                height,
            )
        crops[b, 0] = 0, 0, ramp.width, ramp.height
        crops[b, 2, :2] = 0, 0
        crops[b, 3, :2] = ramp.width - crops[b, 3, 2], ramp.height - crops[b, 3, 3]
    flip = random.random(crops.shape[:2]) < 0.5
    plan = hand_plan(views, crop_px=crops, flip=flip, size_px=np.array([(r.height, r.width) for r in ramps]))
    return RampWork(views=views, work=as_work([r.encoded for r in ramps], plan), ramps=ramps)
