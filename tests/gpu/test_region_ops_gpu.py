import numpy as np
import pytest
import torch

from crisp.benchmarks.warp import random_crops
from crisp.geometry import apply, compose, invert, patch_centres
from crisp.ops import regions as ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PATCH_PX = 16
SIMILARITY_MARGIN = 1e-6
EDGE_PX = 1e-4


def random_tokens(images, patches, channels):
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(images, 1, channels, generator=generator)
    strength = 0.3 + torch.rand(images, patches, 1, generator=generator) * 1.5  # cosines from about .3 to .9
    return shared + strength * torch.randn(images, patches, channels, generator=generator)


def random_maps(views, images, *, turned):
    """Crops at the scales of training, upright or turned about the reference's centre: [V, B, 2, 3] on the CPU."""
    rng = np.random.default_rng(0)
    maps = random_crops(views * images, rng)
    if turned:
        angle = rng.uniform(-np.pi, np.pi, len(maps))
        linear = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(-1, 2, 2)
        centre = np.full((2, 1), 112.0)
        maps = compose(maps, np.concatenate([linear, centre - linear @ centre], -1)).astype(np.float32)
    return torch.from_numpy(maps).unflatten(0, (views, images))


def decided_patches(maps, view_grid):
    points_px = apply(invert(maps.numpy()), patch_centres(view_grid, PATCH_PX))
    near = np.abs(points_px - np.round(points_px / PATCH_PX) * PATCH_PX) < EDGE_PX
    return torch.from_numpy(~near.any(-1))[:, :, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("patches", "channels", "seeds"), [(196, 384, 1), (196, 768, 4), (100, 200, 2), (1024, 1024, 1)]
)
def test_discovery_equals_the_torch_form(dtype, patches, channels, seeds):
    tokens = random_tokens(32, patches, channels).to(dtype)
    seed = torch.randint(patches, (32, seeds), generator=torch.Generator().manual_seed(1))
    by_kernel = ops.discover(tokens.cuda(), seed.cuda(), threshold=0.5, implementation="triton").cpu()
    by_torch = ops.discover(tokens, seed, threshold=0.5, implementation="torch")
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    similarity = torch.stack([unit[b, seed[b]] @ unit[b].T for b in range(len(tokens))])
    decided = (similarity - 0.5).abs() > SIMILARITY_MARGIN
    assert 0.1 < by_torch.float().mean() < 0.9
    assert torch.equal(by_kernel & decided, by_torch & decided)


def test_discovery_reads_tokens_as_they_lie():
    with_class_token = random_tokens(4, 197, 384).cuda()
    channels_first = random_tokens(4, 196, 384).cuda().mT.contiguous().mT
    seeds = torch.tensor([[0], [50], [100], [195]]).cuda()
    for tokens in (with_class_token[:, 1:], channels_first):
        strided = ops.discover(tokens, seeds, threshold=0.5, implementation="triton")
        assert torch.equal(strided, ops.discover(tokens.contiguous(), seeds, threshold=0.5, implementation="triton"))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("reference_grid", "view_grid"), [(14, 14), (14, 6), (32, 14)])
def test_warping_equals_the_torch_form(reference_grid, view_grid, turned):
    maps = random_maps(2, 256, turned=turned)
    regions = torch.from_numpy(np.random.default_rng(0).random((256, 2, reference_grid**2)) < 0.5)
    grids = {"reference_grid": reference_grid, "view_grid": view_grid, "patch_px": PATCH_PX}
    by_kernel, counts = ops.warp(regions.cuda(), maps.cuda(), implementation="triton", **grids)
    by_torch, _ = ops.warp(regions, maps, implementation="torch", **grids)
    decided = decided_patches(maps, view_grid)
    assert 0.05 < by_torch.float().mean() < 0.6
    assert torch.equal(by_kernel.cpu() & decided, by_torch & decided)
    assert torch.equal(counts, by_kernel.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("mode", ["centre", "forward"])
def test_the_step_neither_waits_for_the_device_nor_leaves_it(mode):
    tokens, seeds, maps = (
        random_tokens(8, 196, 384).cuda(),
        torch.arange(8)[:, None].cuda(),
        random_maps(2, 8, turned=False).cuda(),
    )
    options = {"threshold": 0.5, "reference_grid": 14, "view_grid": 14, "patch_px": PATCH_PX, "mode": mode}
    ops.discover_and_warp(tokens, seeds, maps, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        warped = ops.discover_and_warp(tokens, seeds, maps, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(tensor.is_cuda for tensor in warped)


def test_the_step_is_two_launches():
    tokens, seeds, maps = (
        random_tokens(8, 196, 384).cuda(),
        torch.arange(8)[:, None].cuda(),
        random_maps(2, 8, turned=False).cuda(),
    )
    options = {"threshold": 0.5, "reference_grid": 14, "view_grid": 14, "patch_px": PATCH_PX}
    ops.discover_and_warp(tokens, seeds, maps, **options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.discover_and_warp(tokens, seeds, maps, **options)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(kernels) == ["discover_kernel", "warp_centre_kernel"]


def test_cuda_tensors_run_on_triton_unless_told_otherwise():
    device = torch.device("cuda")
    assert ops.resolve_implementation(device) == "triton"
    assert ops.resolve_implementation(device, mode="forward") == "torch"
    assert ops.resolve_implementation(device, "torch") == "torch"
