import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from crisp.benchmarks.warp import forward_fill, random_crops
from crisp.errors import CrispError
from crisp.geometry import apply, compose, crop_affine, invert, patch_centres
from crisp.regions import discover_regions, visible_in_both, warp_regions

PATCH_PX = 16
GRIDS = [(14, 14), (14, 6), (32, 14)]
EDGE_PX = 1e-4  # nearer to a cell's edge than this, float32 and float64 may disagree
IDENTITY = torch.eye(2, 3)


def warp(regions, maps, reference_grid=14, view_grid=14, **options):
    return warp_regions(regions, maps, reference_grid=reference_grid, view_grid=view_grid, patch_px=PATCH_PX, **options)


def warp_one(region, view_from_reference, **options):
    """One square region through one map: [g, g]."""
    maps = torch.as_tensor(view_from_reference, dtype=torch.float32)[None, None]
    grid = region.shape[0]
    return warp(region.reshape(1, 1, -1), maps, reference_grid=grid, **options)[0, 0, 0].unflatten(0, (14, 14))


def random_region(seed, grid=14, share=0.4):
    return torch.from_numpy(np.random.default_rng(seed).random((grid, grid)) < share)


# --- plain twins: one patch at a time, in float64 ---------------------------------------------------------------------


def discover_plainly(tokens, seed, threshold):
    region = np.zeros(len(tokens), bool)
    for i, token in enumerate(tokens):
        similarity = token @ tokens[seed] / np.sqrt((token @ token) * (tokens[seed] @ tokens[seed]))
        region[i] = similarity >= threshold
    region[seed] = True
    return region


def cell_rectangle(index, grid):
    """Corners of a patch, in order round it: [4, 2]."""
    row, column = divmod(index, grid)
    return np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * PATCH_PX + (column * PATCH_PX, row * PATCH_PX)


def warp_centre_plainly(region, view_from_reference, reference_grid, view_grid):
    """Maps each active cell's rectangle into the view and marks the patches whose centre is within it."""
    centres = patch_centres(view_grid, PATCH_PX)
    mask = np.zeros(view_grid**2, bool)
    for cell in np.flatnonzero(region):
        corners = apply(view_from_reference, cell_rectangle(cell, reference_grid))
        sides = np.roll(corners, -1, axis=0) - corners
        offsets = centres[:, None] - corners  # [n, 4, 2]
        turns = sides[:, 0] * offsets[..., 1] - sides[:, 1] * offsets[..., 0]
        mask |= (turns > 0).all(1) | (turns < 0).all(1)
    return mask


def warp_forward_plainly(region, view_from_reference, reference_grid, view_grid):
    mask = np.zeros((view_grid, view_grid), bool)
    for x, y in apply(view_from_reference, patch_centres(reference_grid, PATCH_PX)[region]):
        column, row = int(np.floor(x / PATCH_PX)), int(np.floor(y / PATCH_PX))
        if 0 <= row < view_grid and 0 <= column < view_grid:
            mask[row, column] = True
    return mask.ravel()


def coverage_plainly(region, view_from_reference, reference_grid, view_grid):
    """Share of each view patch that active cells cover, by the area of each pair of rectangles."""
    share = np.zeros(view_grid**2)
    cells = np.stack([cell_rectangle(cell, reference_grid) for cell in np.flatnonzero(region)])  # [active, 4, 2]
    for patch in range(view_grid**2):
        corners = apply(invert(view_from_reference), cell_rectangle(patch, view_grid))
        low, high = corners.min(0), corners.max(0)
        overlap = np.clip(np.minimum(high, cells.max(1)) - np.maximum(low, cells.min(1)), 0, None)
        share[patch] = overlap.prod(1).sum() / (high - low).prod()
    return share


def near_edge(points_px):
    """Whether a point [n, 2] is so near to a cell's edge that rounding decides: [n]."""
    return (np.abs(points_px - np.round(points_px / PATCH_PX) * PATCH_PX) < EDGE_PX).any(1)


@st.composite
def crops(draw, reference_px):
    """Crop windows of a tenth to twice the reference, in it, over its border or touching it, flipped or not."""
    size = [draw(st.floats(0.1, 2)) * reference_px for _ in range(2)]
    corner = [
        draw(
            st.one_of(
                st.just(0.0), st.just(reference_px - s), st.floats(-0.5, 0.9).map(lambda share: share * reference_px)
            )
        )
        for s in size
    ]
    view_from_reference = crop_affine(np.array([*corner, *size]), draw(st.sampled_from([96, 224])), draw(st.booleans()))
    if draw(st.booleans()):
        view_from_reference[1] *= -1
        view_from_reference[1, 2] += 224
    return view_from_reference.astype(np.float32)


@st.composite
def turned_crops(draw, reference_px):
    """Crops after a rotation about the reference's centre and a shear."""
    angle, shear = draw(st.floats(-np.pi, np.pi)), draw(st.floats(-0.5, 0.5))
    linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]]
    centre = np.full((2, 1), reference_px / 2)
    turn = np.concatenate([linear, centre - linear @ centre], axis=1)
    return compose(draw(crops(reference_px)), turn).astype(np.float32)


# --- discovery --------------------------------------------------------------------------------------------------------


def random_tokens(images=3, patches=49, channels=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(images, 1, channels, generator=generator)
    return shared + torch.randn(images, patches, channels, generator=generator)


@pytest.mark.parametrize("threshold", [-0.2, 0.4, 0.75])
def test_discovery_equals_its_plain_twin(threshold):
    tokens, seeds = random_tokens(), torch.tensor([[0, 48], [7, 7], [20, 3]])
    regions = discover_regions(tokens, seeds, threshold=threshold)
    assert regions.dtype == torch.bool
    assert regions.shape == (3, 2, 49)
    for b in range(3):
        for k in range(2):
            plain = discover_plainly(tokens[b].double().numpy(), int(seeds[b, k]), threshold)
            assert (regions[b, k].numpy() == plain).all()


def test_known_similarities():
    tokens = torch.tensor([[[1.0, 0], [2, 0], [0, 3], [3, 4], [-1, 0], [4, 3]]])  # cosines 1, 1, 0, .6, −1, .8
    region = discover_regions(tokens, torch.tensor([[0]]), threshold=0.7)
    assert region.tolist() == [[[True, True, False, False, False, True]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_are_compared_in_float32(dtype):
    tokens, seeds = random_tokens(images=8, patches=196).to(dtype), torch.arange(8)[:, None]
    regions = discover_regions(tokens, seeds, threshold=0.5)
    assert torch.equal(regions, discover_regions(tokens.float(), seeds, threshold=0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(regions, discover_regions(tokens, seeds, threshold=0.5))


def test_the_seed_always_belongs_and_nothing_else_may():
    tokens, seeds = random_tokens(), torch.tensor([[5], [6], [48]])
    regions = discover_regions(tokens, seeds, threshold=1.0)
    assert torch.equal(regions, torch.nn.functional.one_hot(seeds, 49).bool())


def test_a_zero_token_resembles_nothing():
    tokens = random_tokens(images=2)
    tokens[:, 4] = 0
    regions = discover_regions(tokens, torch.tensor([[4], [9]]), threshold=0.1)
    assert regions[0].nonzero().tolist() == [[0, 4]]  # as a seed: itself alone
    assert not regions[1, 0, 4]
    assert discover_regions(tokens, torch.tensor([[4], [9]]), threshold=-0.5)[0].all()  # a similarity of 0, not NaN


def test_discovery_ignores_length_and_follows_a_permutation():
    tokens, seeds = random_tokens(), torch.tensor([[0], [10], [48]])
    regions = discover_regions(tokens, seeds, threshold=0.5)
    lengths = 2.0 ** torch.arange(-24, 25)[:, None]  # powers of two: no rounding
    assert torch.equal(discover_regions(tokens * lengths, seeds, threshold=0.5), regions)
    order = torch.randperm(49, generator=torch.Generator().manual_seed(1))
    permuted = discover_regions(tokens[:, order], order.argsort()[seeds], threshold=0.5)
    assert torch.equal(permuted, regions[..., order])


def test_a_lower_threshold_only_adds():
    tokens, seeds = random_tokens(), torch.tensor([[0], [10], [48]])
    small, large = (discover_regions(tokens, seeds, threshold=t) for t in (0.6, 0.4))
    assert small.sum() < large.sum()
    assert not (small & ~large).any()


# --- warping against the plain twins ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("reference_grid", "view_grid"), GRIDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_centre_equals_its_plain_twin(reference_grid, view_grid, data):
    view_from_reference = data.draw(turned_crops(reference_grid * PATCH_PX))
    region = random_region(data.draw(st.integers(0, 99)), reference_grid).flatten()
    warped = warp(region[None, None], torch.from_numpy(view_from_reference)[None, None], reference_grid, view_grid)
    plain = warp_centre_plainly(region.numpy(), view_from_reference, reference_grid, view_grid)
    decided = ~near_edge(apply(invert(view_from_reference), patch_centres(view_grid, PATCH_PX)))
    assert (warped.flatten().numpy() == plain)[decided].all()


@pytest.mark.parametrize(("reference_grid", "view_grid"), GRIDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_forward_equals_its_plain_twin(reference_grid, view_grid, data):
    view_from_reference = data.draw(turned_crops(reference_grid * PATCH_PX))
    centres = apply(view_from_reference, patch_centres(reference_grid, PATCH_PX))
    region = random_region(data.draw(st.integers(0, 99)), reference_grid).flatten().numpy() & ~near_edge(centres)
    maps = torch.from_numpy(view_from_reference)[None, None]
    warped = warp(torch.from_numpy(region)[None, None], maps, reference_grid, view_grid, mode="forward")
    plain = warp_forward_plainly(region, view_from_reference, reference_grid, view_grid)
    assert (warped.flatten().numpy() == plain).all()


@pytest.mark.parametrize(("reference_grid", "view_grid"), GRIDS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_coverage_equals_rectangle_areas(reference_grid, view_grid, data):
    view_from_reference = data.draw(crops(reference_grid * PATCH_PX))
    region = random_region(data.draw(st.integers(0, 99)), reference_grid).flatten()
    share = coverage_plainly(region.numpy(), view_from_reference, reference_grid, view_grid)
    for min_coverage in (0.1, 0.5, 0.9):
        warped = warp(
            region[None, None],
            torch.from_numpy(view_from_reference)[None, None],
            reference_grid,
            view_grid,
            mode="coverage",
            min_coverage=min_coverage,
        )
        decided = np.abs(share - min_coverage) > 2e-5
        assert (warped.flatten().numpy() == (share >= min_coverage))[decided].all()


@pytest.mark.parametrize("mode", ["centre", "forward", "coverage"])
def test_every_view_image_and_seed_is_warped_on_its_own(mode):
    rng = np.random.default_rng(3)
    views, images, seeds = 3, 4, 2
    windows = np.concatenate([rng.uniform(0, 100, (views, images, 2)), rng.uniform(40, 120, (views, images, 2))], -1)
    maps = torch.from_numpy(crop_affine(windows, 224, rng.random((views, images)) < 0.5)).float()
    regions = torch.from_numpy(rng.random((images, seeds, 196)) < 0.5)
    together = warp(regions, maps, mode=mode)
    assert together.shape == (views, images, seeds, 196)
    for v, b, k in np.ndindex(views, images, seeds):
        alone = warp(regions[b, k][None, None], maps[v, b][None, None], mode=mode)
        assert torch.equal(together[v, b, k], alone[0, 0, 0])


# --- warping, known by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["centre", "forward", "coverage"])
def test_identity_and_flip(mode):
    region = random_region(0)
    assert torch.equal(warp_one(region, IDENTITY, mode=mode), region)
    flip = crop_affine(np.array([0, 0, 224, 224]), 224, flip=True)
    assert torch.equal(warp_one(region, flip, mode=mode), region.flip(1))


def test_half_crop():
    region = random_region(1)
    right_lower = crop_affine(np.array([112, 112, 112, 112]), 224)
    doubled = region[7:, 7:].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(warp_one(region, right_lower), doubled)
    assert torch.equal(warp_one(region, right_lower, mode="coverage", min_coverage=1.0), doubled)
    # a cell's centre lands on the corner of four patches and belongs to the right lower one: three holes in four
    holes = torch.zeros(14, 14, dtype=torch.bool)
    holes[1::2, 1::2] = region[7:, 7:]
    assert torch.equal(warp_one(region, right_lower, mode="forward"), holes)


def test_a_view_beyond_the_reference_shows_nothing_there():
    everything = torch.ones(14, 14, dtype=torch.bool)
    shifted = crop_affine(np.array([160, 0, 224, 224]), 224)  # four columns of the reference are left
    for mode in ("centre", "forward", "coverage"):
        seen = warp_one(everything, shifted, mode=mode)
        assert seen[:, :4].all()
        assert not seen[:, 4:].any()


@pytest.mark.parametrize(("min_coverage", "patches"), [(1.0, 6 * 6), (0.51, 6 * 6), (0.5, 8 * 8 - 4), (0.25, 8 * 8)])
def test_coverage_of_a_reference_seen_at_half_its_size(min_coverage, patches):
    everything = torch.ones(14, 14, dtype=torch.bool)
    whole_and_margin = crop_affine(np.array([-112, -112, 448, 448]), 224)  # it fills 56..168 px: 3.5 to 10.5 patches
    seen = warp_one(everything, whole_and_margin, mode="coverage", min_coverage=min_coverage)
    assert seen.sum() == patches


def test_rounding_leaves_no_hole_where_every_patch_is_covered_whole():
    maps = torch.from_numpy(random_crops(200, np.random.default_rng(0)))[None]
    everything = torch.ones(200, 1, 196, dtype=torch.bool)
    assert warp(everything, maps, mode="coverage", min_coverage=1.0).all()


@pytest.mark.parametrize("mode", ["centre", "forward"])
def test_a_quarter_turn(mode):
    region = random_region(2)
    turn = torch.tensor([[0.0, -1, 224], [1, 0, 0]])  # (x, y) → (224 − y, x): clockwise
    assert torch.equal(warp_one(region, turn, mode=mode), region.rot90(-1))


@pytest.mark.parametrize("mode", ["centre", "coverage"])
def test_a_map_that_flattens_the_reference_shows_nothing(mode):
    everything = torch.ones(14, 14, dtype=torch.bool)
    assert not warp_one(everything, torch.tensor([[0.0, 0, 8], [0, 1, 0]]), mode=mode).any()


def test_forward_fills_about_half_of_centre_at_the_crop_scales_of_training():
    assert forward_fill(1000, np.random.default_rng(0)) == pytest.approx(0.52, abs=0.02)


# --- invariances ------------------------------------------------------------------------------------------------------


@given(view_from_reference=turned_crops(224), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_flipped_view_shows_the_flipped_mask(view_from_reference, seed):
    region = random_region(seed)
    flip = crop_affine(np.array([0, 0, 224, 224]), 224, flip=True)
    decided = ~near_edge(apply(invert(view_from_reference), patch_centres(14, PATCH_PX))).reshape(14, 14)
    mask = warp_one(region, view_from_reference).numpy()
    flipped = warp_one(region, compose(flip, view_from_reference)).numpy()
    assert (mask == flipped[:, ::-1])[decided].all()


@pytest.mark.parametrize("mode", ["centre", "forward"])
@given(view_from_reference=turned_crops(224), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_warp_of_a_union_is_the_union_of_warps(mode, view_from_reference, seed):
    first, second = random_region(seed), random_region(seed + 100)
    both = warp_one(first | second, view_from_reference, mode=mode)
    one_by_one = warp_one(first, view_from_reference, mode=mode) | warp_one(second, view_from_reference, mode=mode)
    assert torch.equal(both, one_by_one)


# --- the seam ---------------------------------------------------------------------------------------------------------


def test_visible_in_both():
    sizes = torch.tensor([[[4, 3, 9], [0, 5, 4]], [[4, 9, 3], [9, 5, 196]]])  # [2, B, K]
    view_regions = torch.arange(196) < sizes[..., None]
    assert visible_in_both(view_regions, min_patches=4).tolist() == [[True, False, False], [False, True, True]]


def test_no_gradient_is_recorded():
    tokens = random_tokens().requires_grad_()
    regions = discover_regions(tokens * 2, torch.zeros(3, 1, dtype=torch.long), threshold=0.5)
    maps = IDENTITY.expand(2, 3, 2, 3).clone().requires_grad_()
    view_regions = warp(regions, maps, reference_grid=7, view_grid=7)
    assert not regions.requires_grad
    assert not view_regions.requires_grad
    assert view_regions.dtype == torch.bool


@pytest.mark.parametrize("mode", ["centre", "forward"])
def test_nothing_reads_a_value_back_to_the_host(mode):
    with FakeTensorMode():  # has shapes and no values: reading one raises
        regions = discover_regions(torch.randn(2, 196, 8), torch.zeros(2, 1, dtype=torch.long), threshold=0.5)
        view_regions = warp(regions, torch.randn(2, 2, 2, 3), mode=mode)
        assert visible_in_both(view_regions, min_patches=4).shape == (2, 1)


def test_coverage_refuses_rotation_and_shear():
    angle = np.deg2rad(0.1)
    turned = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]]
    with pytest.raises(CrispError, match=r"turns or shears \(by up to 0\.391 px\).*use mode 'centre' or 'forward'$"):
        warp_one(random_region(0), turned, mode="coverage")
    rounding = IDENTITY + torch.tensor([[0, 1e-7, 0], [-1e-7, 0, 0]])
    assert torch.equal(warp_one(random_region(0), rounding, mode="coverage"), random_region(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": torch.zeros(1, 1, 100, dtype=torch.bool)}, r"regions \[1, 1, 100\].*need \[B, K, 196\] bool"),
        ({"regions": torch.zeros(1, 1, 196)}, "float32: need"),
        ({"view_from_reference": IDENTITY.expand(2, 3, 2, 3)}, r"\[2, 3, 2, 3\]: need \[V, 1, 2, 3\] for 1 images"),
        ({"view_from_reference": IDENTITY.expand(2, 1, 2, 3).half()}, "float16: half precision cannot hold pixels"),
        ({"mode": "nearest"}, "warp mode 'nearest': unknown; use 'centre', 'forward' or 'coverage'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"regions": torch.zeros(1, 1, 196, dtype=torch.bool), "view_from_reference": IDENTITY[None, None]}
    with pytest.raises(CrispError, match=message) as error:
        warp_regions(**(arguments | change), reference_grid=14, view_grid=14, patch_px=PATCH_PX)
    assert "\n" not in str(error.value)


def test_tokens_and_seeds_must_fit():
    with pytest.raises(CrispError, match=r"tokens \[3, 49, 24\], seeds \[2, 1\]: need"):
        discover_regions(random_tokens(), torch.zeros(2, 1, dtype=torch.long), threshold=0.5)
