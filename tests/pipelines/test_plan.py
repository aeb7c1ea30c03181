"""The plan: what a draw may depend on, its distributions (torchvision's where it follows torchvision), its geometry."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from crisp import geometry
from crisp.config import ViewsConfig
from crisp.philox import word
from crisp.pipelines.plan import (
    Plan,
    affines,
    appearance,
    color_matrix,
    crop_windows,
    draw_windows,
    make_plan,
    region_seeds,
)

VIEWS = ViewsConfig()
VIEW_MAJOR = ("view_from_reference", "patch_masks")


def plan_of(views=VIEWS, *, samples=(3,), height=375, width=500, seed=1, epoch=2) -> Plan:
    sample_id = np.asarray(samples)
    height, width = (np.broadcast_to(np.asarray(side), sample_id.shape) for side in (height, width))
    return make_plan(views, seed=seed, epoch=epoch, sample_id=sample_id, height_px=height, width_px=width)


def of_sample(plan: Plan, i: int) -> dict[str, bytes]:
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    return {name: (v[:, i] if name in VIEW_MAJOR else v[i]).tobytes() for name, v in fields.items()}


def furthest_apart(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sample Kolmogorov–Smirnov distance, in units of its 1 % critical value (ties make it smaller)."""
    values = np.union1d(a, b)
    cdf_a = np.searchsorted(np.sort(a), values, side="right") / len(a)
    cdf_b = np.searchsorted(np.sort(b), values, side="right") / len(b)
    return float(np.abs(cdf_a - cdf_b).max() / (1.628 * math.sqrt(1 / len(a) + 1 / len(b))))


def furthest_from_uniform(values: np.ndarray, low: float, high: float) -> float:
    assert values.min() >= low - 1e-6
    assert values.max() <= high + 1e-6
    cdf = np.arange(1, len(values) + 1) / len(values)
    return float(np.abs(cdf - (np.sort(values) - low) / (high - low)).max() * math.sqrt(len(values)) / 1.628)


def assert_share(flags: np.ndarray, probability: float) -> None:
    spread = math.sqrt(max(probability * (1 - probability), 1e-12) / flags.size)
    assert abs(flags.mean() - probability) <= 4 * spread


# ---- what a draw depends on -------------------------------------------------------------------------------------


def test_shapes_and_types():
    plan = plan_of(dataclasses.replace(VIEWS, seeds_per_image=4), samples=(5, 6, 7))
    found = {f.name: (getattr(plan, f.name).shape, getattr(plan, f.name).dtype.name) for f in dataclasses.fields(plan)}
    assert found == {
        "sample_id": ((3,), "int64"),
        "crop_px": ((3, 12, 4), "int32"),
        "flip": ((3, 12), "bool"),
        "color_factors": ((3, 12, 4), "float32"),
        "color_matrix": ((3, 12, 3, 4), "float32"),
        "blur_sigma_px": ((3, 12), "float32"),
        "solarize": ((3, 12), "bool"),
        "view_from_reference": ((12, 3, 2, 3), "float32"),
        "patch_masks": ((2, 3, 196), "bool"),
        "region_seed": ((3, 4), "int64"),
    }
    assert all(getattr(plan, name).flags.c_contiguous for name in found)


@pytest.mark.parametrize("policy", ["uniform", "visible"])
def test_a_sample_is_drawn_the_same_alone_in_any_batch_and_place(policy):
    views = dataclasses.replace(VIEWS, seed_policy=policy, seeds_per_image=4)
    rng = np.random.default_rng(0)
    samples = rng.permutation(1000)[:40]
    height, width = 20 + samples % 7 * 90, 20 + samples % 11 * 60
    whole = plan_of(views, samples=samples, height=height, width=width)
    for picked in ([11], [0, 39], rng.permutation(40), [4, 4, 4]):
        part = plan_of(views, samples=samples[picked], height=height[picked], width=width[picked])
        for i, row in enumerate(picked):
            assert of_sample(part, i) == of_sample(whole, row)


def test_a_view_does_not_depend_on_the_others():
    many = plan_of(VIEWS, samples=range(30))
    for local_views in (0, 4):
        few = plan_of(dataclasses.replace(VIEWS, local_views=local_views), samples=range(30))
        V = 2 + local_views
        assert np.array_equal(few.crop_px, many.crop_px[:, :V])
        assert np.array_equal(few.flip, many.flip[:, :V])
        assert np.array_equal(few.color_factors, many.color_factors[:, :V])
        assert np.array_equal(few.blur_sigma_px, many.blur_sigma_px[:, :V])
        assert np.array_equal(few.solarize, many.solarize[:, :V])
        assert np.array_equal(few.view_from_reference, many.view_from_reference[:V])
        assert np.array_equal(few.patch_masks, many.patch_masks)
        assert np.array_equal(few.region_seed, many.region_seed)


def test_samples_epochs_and_seeds_draw_differently():
    plans = [plan_of(samples=[s], seed=k, epoch=e) for s in (3, 4) for k in (-1, 1) for e in (2, 3)]
    assert len({p.crop_px.tobytes() for p in plans}) == 8
    assert len({p.color_factors.tobytes() for p in plans}) == 8


def test_pinned():
    """One sample, so that no change of a library or of this code changes running experiments unseen."""
    plan = plan_of(dataclasses.replace(VIEWS, local_views=1, seeds_per_image=4))
    assert plan.crop_px.tolist() == PINNED["crop_px"]
    assert plan.flip.tolist() == PINNED["flip"]
    assert plan.solarize.tolist() == PINNED["solarize"]
    assert plan.region_seed.tolist() == PINNED["region_seed"]
    assert plan.patch_masks.sum(axis=2).tolist() == PINNED["masked"]
    np.testing.assert_allclose(plan.color_factors, PINNED["color_factors"], rtol=1e-5)
    np.testing.assert_allclose(plan.blur_sigma_px, PINNED["blur_sigma_px"], rtol=1e-5)


PINNED = {
    "crop_px": [[[33, 11, 318, 361], [105, 79, 313, 274], [242, 143, 211, 219]]],
    "flip": [[False, True, True]],
    "solarize": [[False, False, False]],
    "region_seed": [[107, 184, 149, 159]],
    "masked": [[0], [0]],
    "color_factors": [
        [
            [1.032503, 0.6728256, 0.0, 4.588918],
            [0.6350272, 1.2788, 1.10945, -5.955745],
            [1.199656, 1.329619, 0.8626505, 25.61079],
        ]
    ],
    "blur_sigma_px": [[1.06658, 0.0, 1.117165]],
}


# ---- crops ------------------------------------------------------------------------------------------------------


def crops_of(height: int, width: int, count: int, *, scale, aspect=VIEWS.aspect) -> np.ndarray:
    """[count, 4] windows of one image, as (x, y, width, height)."""
    views = ViewsConfig(local_views=0, global_scale=scale, aspect=aspect)
    size = np.full(count, height), np.full(count, width)
    return crop_windows(
        views, seed=0, epoch=0, sample_id=np.arange(count), height_px=size[0], width_px=size[1]
    )[:, 0]  # fmt: skip


def torchvision_crops(height: int, width: int, count: int, *, scale, aspect=VIEWS.aspect) -> np.ndarray:
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    drawn = np.array([RandomResizedCrop.get_params(image, list(scale), list(aspect)) for _ in range(count)])
    return drawn[:, [1, 0, 3, 2]]


@pytest.mark.parametrize("scale", [(0.25, 1.0), (0.05, 0.25)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 90), (120, 600), (7, 5)])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    ours = crops_of(height, width, 6000, scale=scale).astype(float)
    theirs = torchvision_crops(height, width, 2000, scale=scale).astype(float)
    for measure in (
        lambda c: c[:, 2] * c[:, 3],
        lambda c: np.log(c[:, 2] / c[:, 3]),
        lambda c: c[:, 0],
        lambda c: c[:, 1],
        lambda c: c[:, 0] + c[:, 2],
        lambda c: c[:, 1] + c[:, 3],
    ):
        assert furthest_apart(measure(ours), measure(theirs)) < 1


@pytest.mark.parametrize(("height", "width"), [(1, 5000), (5000, 1), (1, 1), (2, 900), (900, 2), (1, 2)])
def test_extreme_images_get_torchvisions_windows(height, width):
    ours = {tuple(c) for c in crops_of(height, width, 500, scale=(0.25, 1.0)).tolist()}
    theirs = {tuple(c) for c in torchvision_crops(height, width, 500, scale=(0.25, 1.0)).tolist()}
    assert ours == theirs
    if max(height, width) > 100:  # no try fits: the central window
        assert len(ours) == 1


def test_compiled_windows_equal_the_same_in_python():
    rng = np.random.default_rng(0)
    samples = np.arange(40, dtype=np.uint64)
    height, width = rng.integers(1, 600, (2, 40))
    compiled, plain = (np.zeros((40, 12, 4), np.int32) for _ in range(2))
    scales = np.repeat([[0.25, 0.05], [1.0, 0.25]], [2, 10], axis=1)
    args = (word(1), word(2), samples, height, width, *scales, math.log(3 / 4), math.log(4 / 3))
    draw_windows(compiled, *args)
    draw_windows.py_func(plain, *args)
    assert np.array_equal(compiled, plain)
    assert (compiled[..., 2:].min(axis=(1, 2)) > 0).mean() > 0.5


@given(
    height=st.integers(1, 6000),
    width=st.integers(1, 6000),
    aspect=st.sampled_from([(3 / 4, 4 / 3), (0.01, 0.02), (40.0, 50.0), (1.0, 1.0)]),
    seed=st.integers(0, 2**64),
)
@settings(max_examples=150, deadline=None)
def test_windows_lie_inside_the_image(height, width, aspect, seed):
    views = dataclasses.replace(VIEWS, aspect=aspect)
    plan = plan_of(views, samples=[1, 2], height=height, width=width, seed=seed)
    x, y, w, h = np.moveaxis(plan.crop_px, -1, 0)
    assert min(x.min(), y.min()) >= 0
    assert min(w.min(), h.min()) >= 1
    assert (x + w).max() <= width
    assert (y + h).max() <= height
    assert np.isfinite(plan.view_from_reference).all()


# ---- appearance -------------------------------------------------------------------------------------------------


def appearance_of(views=VIEWS, samples=8000):
    return appearance(views, seed=0, epoch=0, sample_id=np.arange(samples))


def test_probabilities():
    look = appearance_of()
    assert_share(look.flip, 0.5)
    for group, blur, solarize in ((0, 1.0, 0.0), (1, 0.1, 0.2), (slice(2, None), 0.5, 0.0)):
        assert_share(look.blur_sigma_px[:, group] > 0, blur)
        assert_share(look.solarize[:, group], solarize)
    assert_share(look.color_factors[..., 2] == 0, 0.2)
    jittered = look.color_factors[..., 0] != 1
    assert_share(jittered, 0.8)
    assert np.array_equal(jittered, look.color_factors[..., 3] != 0)
    # each independent of the others
    assert_share(look.flip & jittered, 0.5 * 0.8)
    assert_share(jittered & (look.color_factors[..., 2] == 0), 0.8 * 0.2)
    assert_share(look.flip[:, 0] & look.flip[:, 1], 0.25)


def test_factors_are_uniform_as_torchvisions():
    look = appearance_of(samples=2000)
    brightness, contrast, saturation, hue = look.color_factors[look.color_factors[..., 0] != 1].T
    assert furthest_from_uniform(brightness, 0.6, 1.4) < 1
    assert furthest_from_uniform(contrast, 0.6, 1.4) < 1
    assert furthest_from_uniform(saturation[saturation > 0], 0.8, 1.2) < 1
    assert furthest_from_uniform(hue, -36, 36) < 1
    assert furthest_from_uniform(look.blur_sigma_px[look.blur_sigma_px > 0], 0.1, 2.0) < 1
    assert np.abs(np.corrcoef([brightness, contrast, hue]) - np.eye(3)).max() < 4 / math.sqrt(len(hue))


def test_strong_jitter_stops_at_zero():
    look = appearance_of(dataclasses.replace(VIEWS, jitter=(1.5, 3.0, 2.0, 0.5), jitter_probability=1.0), samples=2000)
    assert look.color_factors[..., :3].min() >= 0
    assert look.color_factors[..., 1].max() > 3.8
    assert furthest_from_uniform(look.color_factors[..., 1].ravel(), 0, 4) < 1


def test_everything_off_and_everything_on():
    off = appearance_of(
        ViewsConfig(
            flip_probability=0,
            jitter_probability=0,
            grayscale_probability=0,
            blur_probability=(0, 0, 0),
            solarize_probability=(0, 0, 0),
        )
    )
    assert not off.flip.any()
    assert not off.blur_sigma_px.any()
    assert not off.solarize.any()
    assert (off.color_factors == (1, 1, 1, 0)).all()
    on = appearance_of(
        ViewsConfig(
            flip_probability=1,
            grayscale_probability=1,
            blur_probability=(1, 1, 1),
            solarize_probability=(1, 1, 1),
        )
    )
    assert on.flip.all()
    assert (on.blur_sigma_px > 0).all()
    assert on.solarize.all()
    assert (on.color_factors[..., 2] == 0).all()


# ---- colour -----------------------------------------------------------------------------------------------------


def twisted(pixels: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """The twin of `color_matrix`: each step on its own, [N, 3] in 0..255."""
    yiq_from_rgb = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    luma, i, q = yiq_from_rgb @ pixels.T
    i, q = saturation * i, saturation * q
    angle = math.radians(-hue)
    i, q = i * math.cos(angle) - q * math.sin(angle), i * math.sin(angle) + q * math.cos(angle)
    twisted_rgb = np.linalg.solve(yiq_from_rgb, np.stack([luma, i, q])).T
    return brightness * (contrast * (twisted_rgb - 128) + 128)


FACTORS = np.array(
    [
        (1, 1, 1, 0),
        (1.4, 1, 1, 0),
        (1, 0.6, 1, 0),
        (1.3, 1.4, 1, 0),
        (1, 1, 0, 0),
        (1, 1, 1.2, 0),
        (1, 1, 1, 36),
        (1, 1, 1, -36),
        (0.7, 1.3, 0.8, 23),
        (1.2, 0.8, 0, -30),
    ],
    np.float32,
)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """[64, 64, 3] uint8, all of the cube's corners among them."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image[0, :8] = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)])
    return image


def test_color_matrix_equals_the_steps(pixels):
    matrices = color_matrix(FACTORS)
    assert matrices.dtype == np.float32
    flat = pixels.reshape(-1, 3).astype(float)
    for factors, matrix in zip(FACTORS.astype(float), matrices, strict=True):
        np.testing.assert_allclose(flat @ matrix[:, :3].T + matrix[:, 3], twisted(flat, *factors), atol=1e-3)


def test_color_matrix_keeps_what_it_should(pixels):
    neutral, gray = color_matrix(np.array([(1, 1, 1, 0), (1, 1, 0, 20)], np.float32))
    flat = pixels.reshape(-1, 3).astype(float)
    np.testing.assert_allclose(flat @ neutral[:, :3].T + neutral[:, 3], flat, atol=1e-3)
    grays = flat @ gray[:, :3].T + gray[:, 3]
    luma = (flat @ [0.299, 0.587, 0.114])[:, None]
    np.testing.assert_allclose(grays, np.repeat(luma, 3, axis=1), atol=0.003 * 255)  # DALI's white is .3 % blue


@pytest.mark.parametrize("exact", [False, True])
def test_color_matrix_equals_dali(pixels, exact):
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra cuda13 or cuda12)")
    fn = dali.fn

    @dali.pipeline_def(batch_size=len(FACTORS), num_threads=1, device_id=None)
    def twist():
        def per_sample(values):
            return fn.external_source(lambda: list(values), batch=True)

        brightness, contrast, saturation, hue = map(per_sample, FACTORS.T)
        return fn.color_twist(
            per_sample([pixels] * len(FACTORS)),
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            dtype=dali.types.FLOAT if exact else dali.types.UINT8,
        )

    pipeline = twist()
    pipeline.build()
    (rendered,) = pipeline.run()
    for i, matrix in enumerate(color_matrix(FACTORS)):
        ours = pixels.astype(np.float32) @ matrix[:, :3].T + matrix[:, 3]
        if not exact:
            ours = np.clip(ours, 0, 255)
        difference = np.abs(np.asarray(rendered.at(i)).astype(np.float32) - ours).max()
        assert difference <= (1e-3 if exact else 0.501), FACTORS[i]  # half a level is the rounding


# ---- geometry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_affines_take_known_points_to_known_places(flip):
    """A window (100, 50, 200 × 100) of a 400 × 300 image whose reference is 224 × 224."""
    views = dataclasses.replace(VIEWS, local_views=1)
    crop = np.tile(np.array([100, 50, 200, 100], np.int32), (1, 3, 1))
    maps = affines(
        views, crop_px=crop, flip=np.full((1, 3), flip), height_px=np.array([300]), width_px=np.array([400])
    )  # fmt: skip
    assert maps.shape == (3, 1, 2, 3)
    assert maps.dtype == np.float32
    image_points = np.array([[100, 50], [300, 50], [100, 150], [200, 100]], float)
    reference_points = image_points * (224 / 400, 224 / 300)
    for side, view_from_reference in zip((224, 224, 96), maps[:, 0], strict=True):
        expected = np.array([[0, 0], [side, 0], [0, side], [side / 2, side / 2]], float)
        if flip:
            expected[:, 0] = side - expected[:, 0]
        np.testing.assert_allclose(geometry.apply(view_from_reference, reference_points), expected, atol=1e-3)


def test_affines_of_a_plan_agree_with_its_windows_and_flips():
    plan = plan_of(samples=range(50), height=np.arange(50) * 20 + 1, width=np.arange(50)[::-1] * 31 + 1)
    height, width = np.arange(50) * 20 + 1, np.arange(50)[::-1] * 31 + 1
    for b in range(50):
        for v, side in enumerate(VIEWS.view_px):
            x, y, w, h = plan.crop_px[b, v].astype(float)
            corners = np.array([[x, y], [x + w, y + h]]) * (224 / width[b], 224 / height[b])
            (left, top), (right, bottom) = geometry.apply(plan.view_from_reference[v, b], corners)
            expected = (side, 0, 0, side) if plan.flip[b, v] else (0, 0, side, side)
            np.testing.assert_allclose((left, top, right, bottom), expected, atol=0.02)


# ---- region seeds -----------------------------------------------------------------------------------------------


def seeds_of(views: ViewsConfig, crop_px: np.ndarray, samples: int, height=375, width=500) -> np.ndarray:
    return region_seeds(
        views,
        seed=0,
        epoch=0,
        sample_id=np.arange(samples),
        crop_px=np.broadcast_to(crop_px, (samples, *crop_px.shape)),
        height_px=np.full(samples, height),
        width_px=np.full(samples, width),
    )


# Both windows show x in [250, 400) and y in [100, 200) of 500 × 375.
OVERLAPPING = np.array([[0, 100, 400, 275], [250, 0, 250, 200]], np.int32)
APART = np.array([[0, 0, 100, 100], [300, 200, 100, 100]], np.int32)


def assert_uniform_over(seeds: np.ndarray, allowed: np.ndarray) -> None:
    counts = np.bincount(seeds.ravel(), minlength=196)
    assert set(np.flatnonzero(counts)) == set(allowed.tolist())
    expected = seeds.size / len(allowed)
    chi_square = ((counts[allowed] - expected) ** 2 / expected).sum()
    assert chi_square < len(allowed) + 4 * math.sqrt(2 * len(allowed))


@pytest.mark.parametrize("K", [1, 4, 5])
def test_uniform_seeds(K):
    seeds = seeds_of(dataclasses.replace(VIEWS, seeds_per_image=K), OVERLAPPING, 6000)
    assert seeds.shape == (6000, K)
    assert_uniform_over(seeds, np.arange(196))
    if K > 1:
        assert_share(seeds[:, 0] == seeds[:, 1], 1 / 196)


def test_more_seeds_keep_the_first_ones():
    for policy in ("uniform", "visible"):
        one, six = (
            seeds_of(dataclasses.replace(VIEWS, seeds_per_image=K, seed_policy=policy), OVERLAPPING, 50) for K in (1, 6)
        )
        assert np.array_equal(one[:, 0], six[:, 0])


def test_visible_seeds_lie_in_both_crops_uniformly():
    views = dataclasses.replace(VIEWS, seeds_per_image=4, seed_policy="visible")
    x, y = (geometry.patch_centres(14, 16) * (500 / 224, 375 / 224)).T
    shown = np.flatnonzero((x >= 250) & (x < 400) & (y >= 100) & (y < 200))
    assert 10 < len(shown) < 30
    assert_uniform_over(seeds_of(views, OVERLAPPING, 3000), shown)


def test_visible_seeds_are_uniform_over_all_where_nothing_is():
    views = dataclasses.replace(VIEWS, seeds_per_image=4, seed_policy="visible")
    assert_uniform_over(seeds_of(views, APART, 3000), np.arange(196))


def test_visible_seeds_of_plans_land_inside_both_global_views():
    views = dataclasses.replace(VIEWS, seeds_per_image=4, seed_policy="visible")
    plan = plan_of(views, samples=range(300))
    centres = geometry.patch_centres(14, 16)
    inside = np.stack(
        [
            ((points >= -1e-3) & (points <= 224 + 1e-3)).all(axis=-1)
            for points in (geometry.apply(plan.view_from_reference[v], centres) for v in (0, 1))
        ]
    ).all(axis=0)  # [B, 196]
    seen = np.take_along_axis(inside, plan.region_seed, axis=1).all(axis=1)
    assert np.array_equal(seen, inside.any(axis=1))
    assert seen.mean() > 0.8


# ---- corner cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("policy", ["uniform", "visible"])
def test_tiny_and_narrow_images(height, width, policy):
    plan = plan_of(dataclasses.replace(VIEWS, seed_policy=policy), samples=range(20), height=height, width=width)
    assert plan.crop_px[..., 2:].min() >= 1
    assert np.isfinite(plan.view_from_reference).all()
    assert np.isfinite(plan.color_matrix).all()
    assert plan.region_seed.min() >= 0
    assert plan.region_seed.max() < 196


def test_index_columns_are_taken_as_they_are():
    """Unsigned 32-bit sides, as the shard index has them, must not wrap."""
    size = np.array([375], np.uint32), np.array([500], np.uint32)
    plan = make_plan(VIEWS, seed=1, epoch=2, sample_id=np.array([3]), height_px=size[0], width_px=size[1])
    assert of_sample(plan, 0) == of_sample(plan_of(), 0)
