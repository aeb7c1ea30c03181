"""Block masks against a twin written from their description, and in the properties that the losses rely on."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crisp.config import ViewsConfig
from crisp.masking import draw_masks, patch_masks, pick_patches, place_blocks
from crisp.philox import word

VIEWS = ViewsConfig()
BLOCK_ARGS = (math.log(0.3), math.log(1 / 0.3))


def masks_of(samples: int, *, seed: int = 0, **changes) -> np.ndarray:
    views = dataclasses.replace(VIEWS, **changes)
    return patch_masks(views, seed=seed, epoch=0, sample_id=np.arange(samples))


def described_block_mask(rng: np.random.Generator, grid: int, target: float, aspect=(0.3, 1 / 0.3)) -> np.ndarray:
    """The twin: METHOD's description in NumPy, with a generator of its own."""
    mask = np.zeros((grid, grid), bool)
    while mask.sum() < target:
        remaining = target - mask.sum()
        for _ in range(10):
            area = rng.uniform(*sorted([(grid // 3) ** 2, remaining]))
            ratio = np.exp(rng.uniform(*np.log(aspect)))
            h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if h >= grid or w >= grid:
                continue
            top, left = rng.integers(grid - h + 1), rng.integers(grid - w + 1)
            new = (~mask[top : top + h, left : left + w]).sum()
            if 1 <= new <= remaining:
                mask[top : top + h, left : left + w] = True
                break
        else:
            return mask
    return mask


def furthest_apart(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sample Kolmogorov–Smirnov distance, in units of its 1 % critical value (ties make it smaller)."""
    values = np.union1d(a, b)
    cdf_a = np.searchsorted(np.sort(a), values, side="right") / len(a)
    cdf_b = np.searchsorted(np.sort(b), values, side="right") / len(b)
    return float(np.abs(cdf_a - cdf_b).max() / (1.628 * math.sqrt(1 / len(a) + 1 / len(b))))


def extents(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of what is masked, [N, h, w] → [N], [N]."""
    return masks.any(axis=2).sum(axis=1), masks.any(axis=1).sum(axis=1)


@pytest.mark.parametrize(("grid", "ratio"), [(14, 0.12), (14, 0.3), (14, 0.5), (6, 0.4), (2, 0.5)])
def test_blocks_are_distributed_as_described(grid, ratio):
    rng = np.random.default_rng(7)
    twin = np.stack([described_block_mask(rng, grid, ratio * grid**2) for _ in range(1500)])
    ours = masks_of(4000, global_px=16 * grid, mask_probability=1.0, mask_ratio=(ratio, ratio)).reshape(-1, grid, grid)
    assert furthest_apart(ours.sum((1, 2)), twin.sum((1, 2))) < 1
    for mine, his in zip(extents(ours), extents(twin), strict=True):
        assert furthest_apart(mine, his) < 1
    # where: every patch is masked as often as in the twin (standard deviations of the difference)
    spread = np.sqrt(twin.mean(0) * (1 - twin.mean(0)) * (1 / len(twin) + 1 / len(ours))) + 1e-9
    assert (np.abs(ours.mean(0) - twin.mean(0)) < 4.5 * spread).all()


@pytest.mark.parametrize("ratio", [(0.1, 0.5), (0.65, 0.75)])
def test_half_of_the_views_are_masked_at_uniform_ratios(ratio):
    masks = masks_of(6000, mask_ratio=ratio, mask_shape="rand")
    share = masks.mean(axis=2)
    for view in share:
        assert abs((view > 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(6000)
        drawn = np.sort(view[view > 0])
        assert drawn[0] >= ratio[0] - 1 / 196
        assert drawn[-1] <= ratio[1]
        low, high = np.floor(np.array(ratio) * 196) / 196
        assert abs(drawn.mean() - (low + high) / 2) < 0.01
    both = (share > 0).all(axis=0).mean()  # each view draws its own
    assert abs(both - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 6000)


@given(
    grid=st.integers(1, 32),
    ratio=st.floats(0, 1),
    shape=st.sampled_from(["block", "rand"]),
    aspect=st.sampled_from([(0.3, 1 / 0.3), (1.0, 1.0), (0.01, 100.0)]),
    seed=st.integers(-(2**70), 2**70),
)
@settings(max_examples=150, deadline=None)
def test_never_over_the_target(grid, ratio, shape, aspect, seed):
    views = dataclasses.replace(
        VIEWS,
        global_px=16 * grid,
        mask_probability=1.0,
        mask_ratio=(ratio, ratio),
        mask_shape=shape,
        mask_aspect=aspect,
    )
    masks = patch_masks(views, seed=seed, epoch=3, sample_id=np.array([5, 9]))
    assert masks.shape == (2, 2, grid * grid)
    assert masks.dtype == np.bool_
    counts = masks.sum(axis=2)
    if shape == "rand":
        assert (counts == int(ratio * grid * grid)).all()
    else:
        assert (counts <= ratio * grid * grid).all()


def test_probability_zero_and_one():
    assert not masks_of(200, mask_probability=0.0).any()
    assert masks_of(200, mask_probability=1.0).any(axis=2).all()


def test_random_patches_are_uniform():
    masks = masks_of(8000, mask_shape="rand", mask_probability=1.0, mask_ratio=(0.3, 0.3)).reshape(-1, 196)
    share = 58 / 196
    assert np.abs(masks.mean(axis=0) - share).max() < 4.5 * math.sqrt(share * (1 - share) / len(masks))
    pairs = (masks[:, :-1] & masks[:, 1:]).mean(axis=0)  # neighbours: without replacement
    expected = share * 57 / 195
    assert np.abs(pairs - expected).max() < 4.5 * math.sqrt(expected * (1 - expected) / len(masks))


def test_a_mask_depends_on_its_sample_alone():
    sample_id = np.array([4, 900, 17, 4, 142_000_000])
    together = patch_masks(VIEWS, seed=1, epoch=2, sample_id=sample_id)
    assert np.array_equal(together[:, 0], together[:, 3])
    for i in range(5):
        alone = patch_masks(VIEWS, seed=1, epoch=2, sample_id=sample_id[i : i + 1])
        assert np.array_equal(alone[:, 0], together[:, i])


def test_masks_differ_by_view_seed_and_epoch():
    views = dataclasses.replace(VIEWS, mask_probability=1.0)
    drawn = [
        patch_masks(views, seed=seed, epoch=epoch, sample_id=np.array([3]))[view, 0].tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
        for view in (0, 1)
    ]
    assert len(set(drawn)) == 8


@pytest.mark.parametrize("block_shaped", [True, False])
def test_compiled_equals_the_same_in_python(block_shaped):
    compiled, plain = (np.zeros((2, 20, 14, 14), bool) for _ in range(2))
    args = (word(3), word(1), np.arange(20, dtype=np.uint64), 0.5, 0.1, 0.5, *BLOCK_ARGS, block_shaped)
    draw_masks(compiled, *args)
    draw_masks.py_func(plain, *args)
    assert np.array_equal(compiled, plain)
    assert compiled.any()


@pytest.mark.parametrize("target", [3.5, 40.0, 98.7, 196.0])
def test_compiled_parts_equal_the_same_in_python(target):
    for sample in range(20):
        address = (word(3), word(1), word(0), word(sample))
        compiled, plain = (np.zeros((14, 14), bool) for _ in range(2))
        place_blocks(compiled, target, *BLOCK_ARGS, *address)
        place_blocks.py_func(plain, target, *BLOCK_ARGS, *address)
        assert np.array_equal(compiled, plain)
        compiled[:], plain[:] = False, False
        pick_patches(compiled, int(target), *address)
        pick_patches.py_func(plain, int(target), *address)
        assert np.array_equal(compiled, plain)
        assert compiled.sum() == int(target)


def test_pinned():
    """One mask, so that no change of a library or of this code changes running experiments unseen."""
    mask = patch_masks(
        dataclasses.replace(VIEWS, mask_probability=1.0, global_px=128), seed=1, epoch=2, sample_id=np.array([3])
    )[0, 0]
    assert ["".join(".#"[patch] for patch in row) for row in mask.reshape(8, 8).astype(int)] == PINNED


PINNED = [
    "..##....",
    "####....",
    "####....",
    "####....",
    "..##....",
    "........",
    "........",
    "........",
]
