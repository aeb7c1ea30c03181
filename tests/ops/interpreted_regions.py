"""The Triton kernels in Triton's interpreter, on the CPU, against their plain torch form.

`test_triton_interpreter.py` runs this file in a process of its own, since Triton decides once, when a kernel is
defined, whether it is compiled or interpreted. By hand: TRITON_INTERPRET=1 pytest tests/ops/interpreted_regions.py
"""

import numpy as np
import pytest
import torch

from crisp.geometry import apply, compose, crop_affine, invert, patch_centres
from crisp.ops import regions as ops
from crisp.ops import regions_torch, regions_triton

PATCH_PX = 16
GRIDS = [(14, 14), (14, 6), (32, 14)]
SIMILARITY_MARGIN = 1e-6
EDGE_PX = 1e-4


def random_tokens(images, patches, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(images, 1, channels, generator=generator)
    strength = 0.3 + torch.rand(images, patches, 1, generator=generator) * 1.5  # cosines from about .3 to .9
    return shared + strength * torch.randn(images, patches, channels, generator=generator)


def random_seeds(images, seeds, patches):
    return torch.randint(patches, (images, seeds), generator=torch.Generator().manual_seed(1))


def random_maps(views, images, reference_px, *, turned, seed=0):
    """Crops of a tenth to twice the reference, flipped or not, over its border or along it; turned or upright."""
    rng = np.random.default_rng(seed)
    shape = (views, images)
    size = rng.uniform(0.1, 2, (*shape, 2)) * reference_px
    corner = rng.uniform(-0.5, 0.9, (*shape, 2)) * reference_px
    along_border = rng.random((*shape, 2)) < 0.25
    corner = np.where(along_border, np.where(rng.random((*shape, 2)) < 0.5, 0, reference_px - size), corner)
    maps = crop_affine(np.concatenate([corner, size], -1), 224, rng.random(shape) < 0.5)
    if turned:
        angle, shear = rng.uniform(-np.pi, np.pi, shape), rng.uniform(-0.5, 0.5, shape)
        cosine, sine, one, zero = np.cos(angle), np.sin(angle), np.ones(shape), np.zeros(shape)
        linear = np.stack([cosine, -sine, sine, cosine], -1).reshape(*shape, 2, 2)
        linear = linear @ np.stack([one, shear, zero, one], -1).reshape(*shape, 2, 2)
        centre = np.full((2, 1), reference_px / 2)
        maps = compose(maps, np.concatenate([linear, centre - linear @ centre], -1))
    return torch.from_numpy(maps.astype(np.float32))


def decided_patches(maps, view_grid):
    """View patches whose centre is not so near to a cell's edge that rounding decides: [V, B, 1, n]."""
    points_px = apply(invert(maps.numpy()), patch_centres(view_grid, PATCH_PX))
    near = np.abs(points_px - np.round(points_px / PATCH_PX) * PATCH_PX) < EDGE_PX
    return torch.from_numpy(~near.any(-1))[:, :, None]


def decided_similarities(tokens, seeds, threshold):
    """Patches whose similarity to the seed is not so near to the threshold that rounding decides: [B, K, N]."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    similarity = torch.stack([unit[b, seeds[b]] @ unit[b].T for b in range(len(tokens))])
    return (similarity - threshold).abs() > SIMILARITY_MARGIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("patches", "channels", "seeds"), [(196, 384, 1), (36, 192, 3), (100, 200, 2), (49, 1024, 1), (1024, 64, 1)]
)
def test_discovery_equals_the_torch_form(dtype, patches, channels, seeds):
    tokens, seed = random_tokens(3, patches, channels).to(dtype), random_seeds(3, seeds, patches)
    by_kernel = ops.discover(tokens, seed, threshold=0.5, implementation="triton")
    by_torch = ops.discover(tokens.float(), seed, threshold=0.5, implementation="torch")
    decided = decided_similarities(tokens, seed, 0.5)
    assert by_kernel.dtype == torch.bool
    assert 0.1 < by_torch.float().mean() < 0.9
    assert decided.float().mean() > 0.99
    assert torch.equal(by_kernel & decided, by_torch & decided)


def test_discovery_reads_tokens_as_they_lie():
    with_class_token = random_tokens(2, 50, 96)
    channels_first = random_tokens(2, 49, 96, seed=1).mT.contiguous().mT
    for tokens in (with_class_token[:, 1:], channels_first, random_tokens(4, 49, 96, seed=2)[::2]):
        seeds = random_seeds(2, 2, 49)
        assert not tokens.is_contiguous()
        by_kernel = ops.discover(tokens, seeds, threshold=0.5, implementation="triton")
        assert torch.equal(by_kernel, ops.discover(tokens, seeds, threshold=0.5, implementation="torch"))


def test_discovery_of_zero_and_nan_tokens():
    tokens = random_tokens(4, 49, 32)
    tokens[:, 4], tokens[:, 5] = 0, torch.nan
    seeds = torch.tensor([[0], [4], [5], [48]])
    by_kernel = ops.discover(tokens, seeds, threshold=0.5, implementation="triton")
    assert torch.equal(by_kernel, ops.discover(tokens, seeds, threshold=0.5, implementation="torch"))
    assert by_kernel.gather(2, seeds[..., None]).all()
    assert by_kernel[1:3].sum() == 2
    by_kernel = ops.discover(tokens, seeds, threshold=-0.5, implementation="triton")  # a similarity of 0, not NaN
    assert torch.equal(by_kernel, ops.discover(tokens, seeds, threshold=-0.5, implementation="torch"))
    assert by_kernel[1, 0].sum() == 48


@pytest.mark.parametrize("seed", [-1, 49, 10**9])
def test_a_seed_outside_the_grid_reads_no_memory_beyond_the_tokens(seed):
    region = ops.discover(random_tokens(1, 49, 32), torch.tensor([[seed]]), threshold=0.5, implementation="triton")
    assert not region.any()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("reference_grid", "view_grid"), GRIDS)
def test_warping_equals_the_torch_form(reference_grid, view_grid, turned):
    views, images, seeds = 4, 32, 2
    maps = random_maps(views, images, reference_grid * PATCH_PX, turned=turned)
    regions = torch.from_numpy(np.random.default_rng(0).random((images, seeds, reference_grid**2)) < 0.5)
    grids = {"reference_grid": reference_grid, "view_grid": view_grid, "patch_px": PATCH_PX}
    by_kernel, counts = ops.warp(regions, maps, implementation="triton", **grids)
    by_torch, _ = ops.warp(regions, maps, implementation="torch", **grids)
    decided = decided_patches(maps, view_grid)
    assert by_kernel.dtype == torch.bool
    assert counts.dtype == torch.int32
    assert 0.05 < by_torch.float().mean() < 0.5
    assert decided.float().mean() > 0.99
    assert torch.equal(by_kernel & decided, by_torch & decided)
    assert torch.equal(counts, by_kernel.sum(-1, dtype=torch.int32))


def test_centres_on_an_edge_fall_to_the_same_side():
    """Seen at half its size, every centre lies on the corner of four cells; halves and thirds are exact in both."""
    windows = np.array([[-112, -112, 448, 448], [0, 0, 448, 448], [0, 0, 224, 224], [32, 16, 672, 672]], float)
    maps = torch.from_numpy(crop_affine(windows, 224, np.array([False, True, True, False])).astype(np.float32))[None]
    regions = torch.from_numpy(np.random.default_rng(0).random((4, 1, 196)) < 0.5)
    grids = {"reference_grid": 14, "view_grid": 14, "patch_px": PATCH_PX}
    by_kernel, _ = ops.warp(regions, maps, implementation="triton", **grids)
    assert torch.equal(by_kernel, ops.warp(regions, maps, implementation="torch", **grids)[0])


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_singular_map_shows_nothing():
    maps = torch.tensor([[0.0, 0, 8], [0, 1, 0]])[None, None]
    regions = torch.ones(1, 1, 196, dtype=torch.bool)
    view_regions, counts = ops.warp(
        regions, maps, reference_grid=14, view_grid=14, patch_px=PATCH_PX, implementation="triton"
    )
    assert not view_regions.any()
    assert counts.tolist() == [[[0]]]


def test_both_kernels_in_a_row_equal_the_torch_form():
    tokens, seeds, maps = (
        random_tokens(4, 196, 96).bfloat16(),
        random_seeds(4, 2, 196),
        random_maps(2, 4, 224, turned=False),
    )
    options = {"threshold": 0.5, "reference_grid": 14, "view_grid": 14, "patch_px": PATCH_PX}
    by_kernel = ops.discover_and_warp(tokens, seeds, maps, implementation="triton", **options)
    by_torch = ops.discover_and_warp(tokens, seeds, maps, implementation="torch", **options)
    for one, other in zip(by_kernel, by_torch, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_operators_are_registered_as_torch_wants_them():
    tokens, seeds, maps = random_tokens(2, 49, 32), random_seeds(2, 2, 49), random_maps(3, 2, 112, turned=True)
    torch.library.opcheck(regions_triton.discover, (tokens, seeds, 0.5, regions_torch.MIN_NORM))
    regions = regions_torch.discover(tokens, seeds, 0.5)
    torch.library.opcheck(regions_triton.warp_centre, (regions, maps, 7, 6, PATCH_PX))


def test_compiled_whole():
    tokens, seeds, maps = random_tokens(2, 49, 32), random_seeds(2, 1, 49), random_maps(2, 2, 112, turned=False)
    options = {"threshold": 0.5, "reference_grid": 7, "view_grid": 7, "patch_px": PATCH_PX, "implementation": "triton"}
    compiled = torch.compile(ops.discover_and_warp, backend="aot_eager", fullgraph=True)(tokens, seeds, maps, **options)
    for one, other in zip(compiled, ops.discover_and_warp(tokens, seeds, maps, **options), strict=True):
        assert torch.equal(one, other)
