"""Each kernel against its plain form, on the device that is examined. `registry.TWINS` lists them."""

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.benchmarks.warp import random_crops
from crisp.doctor.check import Finding, Wrong
from crisp.doctor.config import Context
from crisp.geometry import apply, invert, patch_centres
from crisp.ops import regions as ops
from crisp.ops.cross_entropy import prototype_cross_entropy, prototype_cross_entropy_plain

GRID, PATCH_PX, THRESHOLD = 14, 16, 0.5
IMAGES = 32
GROUPS, PROTOTYPES = 300, 512
"""Of the loss over prototypes: several chunks, and several tiles of the kernels"""
SIMILARITY_MARGIN = 1e-6
"""Nearer to the threshold than this, rounding decides"""
EDGE_PX = 1e-3
"""Nearer to a cell's edge than this, rounding decides"""
CROSS_ENTROPY_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of loss and gradients: norm of the difference to norm"""
FUSED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Likewise; the kernels take no float64"""


def region_kernels(context: Context) -> Finding:
    """Both Triton kernels against the torch form on the CPU, for every type of tokens."""
    device = torch.device(context.device)
    seeds = torch.randint(GRID**2, (IMAGES, 2), generator=torch.Generator().manual_seed(1))
    regions = torch.empty(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tokens = _tokens(IMAGES, 384).to(dtype)
        found = ops.discover(tokens.to(device), seeds.to(device), threshold=THRESHOLD, implementation="triton").cpu()
        regions = ops.discover(tokens, seeds, threshold=THRESHOLD, implementation="torch")
        _require_equal(found, regions, _decided_similarities(tokens, seeds), f"regions of {dtype} tokens")
    maps = torch.from_numpy(random_crops(2 * IMAGES, np.random.default_rng(0))).unflatten(0, (2, IMAGES))
    grids: dict[str, Any] = {"reference_grid": GRID, "view_grid": GRID, "patch_px": PATCH_PX}
    warped, counts = ops.warp(regions.to(device), maps.to(device), implementation="triton", **grids)
    expected, _ = ops.warp(regions, maps, implementation="torch", **grids)
    _require_equal(warped.cpu(), expected, _decided_patches(maps), "warped regions")
    if not torch.equal(counts, warped.sum(-1, dtype=torch.int32)):
        raise Wrong("the kernel's counts are not those of its regions")
    return Finding(figure=f"equal in {3 * regions.numel() + expected.numel():,} patches")


def warp(context: Context) -> Finding:
    """The form that training uses on this device against the geometry in float64, written out."""
    device = torch.device(context.device)
    maps = torch.from_numpy(random_crops(2 * 64, np.random.default_rng(1))).unflatten(0, (2, 64))
    regions = torch.from_numpy(np.random.default_rng(2).random((64, 1, GRID**2)) < 0.5)
    found, _ = ops.warp(regions.to(device), maps.to(device), reference_grid=GRID, view_grid=GRID, patch_px=PATCH_PX)
    points_px = _reference_points(maps)  # [2, B, n, 2]
    cell = np.floor(points_px / PATCH_PX).astype(np.int64)
    inside = ((cell >= 0) & (cell < GRID)).all(-1)  # [2, B, n]
    index = np.where(inside, cell[..., 1] * GRID + cell[..., 0], 0)
    active = np.take_along_axis(regions[:, 0].numpy()[None].repeat(2, 0), index, -1) & inside
    expected = torch.from_numpy(active)[:, :, None]  # [2, B, 1, n]
    _require_equal(found.cpu(), expected, _decided_patches(maps), "warped regions")
    return Finding(figure=f"equal in {expected.numel():,} patches")


def cross_entropy(context: Context) -> Finding:
    """The chunked loss and its gradients against all logits at once, in three types."""
    return _cross_entropies(prototype_cross_entropy, CROSS_ENTROPY_TOLERANCE, torch.device(context.device))


def fused_cross_entropy(context: Context) -> Finding:
    """The Triton kernels of the last layer and its loss (--loss.fused) against all logits at once, in three types."""
    form = functools.partial(prototype_cross_entropy, fused=True)
    return _cross_entropies(form, FUSED_TOLERANCE, torch.device(context.device))


def _cross_entropies(form: Any, tolerances: dict[torch.dtype, float], device: torch.device) -> Finding:
    torch.backends.cuda.matmul.allow_tf32 = False
    values: dict[str, float] = {}
    for dtype, tolerance in tolerances.items():
        half = dtype if dtype in (torch.bfloat16, torch.float16) else None
        given = _bottlenecks(torch.float32 if half else dtype)
        expected = _loss_and_gradients(prototype_cross_entropy_plain, given, torch.device("cpu"), None)
        found = _loss_and_gradients(form, given, device, half)
        for name, value in found.items():
            apart = float((value - expected[name]).norm() / expected[name].norm())
            if not apart <= tolerance:
                raise Wrong(f"{name} in {_short(dtype)} is {apart:.1e} off the plain form, more than {tolerance:g}")
            values[_short(dtype)] = max(values.get(_short(dtype), 0.0), apart)
    said = ", ".join(f"{name} {apart:.0e}" for name, apart in values.items())
    return Finding(figure=f"off by {said}", values=values)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bottlenecks(dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of the loss, two students and two teachers to a group."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(drawn, dim=-1).to(dtype)

    return {
        "student": unit(2, GROUPS, 64),
        "student_prototypes": unit(PROTOTYPES, 64),
        "teacher": unit(2, GROUPS, 64),
        "teacher_prototypes": unit(PROTOTYPES, 64),
        "center": 0.1 * unit(PROTOTYPES),
        "weights": torch.rand(GROUPS, generator=generator, dtype=torch.float64).to(dtype) / GROUPS,
    }


def _loss_and_gradients(
    form: Any, given: dict[str, Tensor], device: torch.device, half: torch.dtype | None
) -> dict[str, Tensor]:
    """Loss, and gradients of the student's bottlenecks and prototypes, float64 on the CPU."""
    tensors = {name: tensor.to(device) for name, tensor in given.items()}
    for name in ("student", "student_prototypes"):
        tensors[name].requires_grad_()
    with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
        loss = form(**tensors, student_temperature=0.1, teacher_temperature=0.05)
    loss.backward()
    found = {"loss": loss.detach()}
    for name in ("student", "student_prototypes"):
        gradient = tensors[name].grad
        assert gradient is not None, "it was asked for"
        found[f"gradient of {name.replace('_', ' ')}"] = gradient
        tensors[name].requires_grad_(False)
        tensors[name].grad = None
    return {name: tensor.double().cpu() for name, tensor in found.items()}


def _tokens(images: int, channels: int) -> Tensor:
    """Patch tokens around a vector of their image, with cosines from about .3 to .9: [B, N, D] float32."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(images, 1, channels, generator=generator)
    strength = 0.3 + 1.5 * torch.rand(images, GRID**2, 1, generator=generator)
    return shared + strength * torch.randn(images, GRID**2, channels, generator=generator)


def _decided_similarities(tokens: Tensor, seeds: Tensor) -> Tensor:
    """Patches whose similarity is not so near to the threshold that rounding decides: [B, K, N] bool."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    chosen = unit.gather(1, seeds[:, :, None].expand(-1, -1, unit.shape[2]))
    return (chosen @ unit.mT - THRESHOLD).abs() > SIMILARITY_MARGIN


def _reference_points(maps: Tensor) -> NDArray[np.float64]:
    """Where the centres of the view's patches lie in the reference: [V, B, n, 2] pixels."""
    return apply(invert(maps.double().numpy()), patch_centres(GRID, PATCH_PX))


def _decided_patches(maps: Tensor) -> Tensor:
    """View patches whose centre is not so near to a cell's edge that rounding decides: [V, B, 1, n] bool."""
    points_px = _reference_points(maps)
    near = np.abs(points_px - np.round(points_px / PATCH_PX) * PATCH_PX) < EDGE_PX
    return torch.from_numpy(~near.any(-1))[:, :, None]


def _require_equal(found: Tensor, expected: Tensor, decided: Tensor, what: str) -> None:
    share = float(expected.float().mean())
    assert 0.02 < share < 0.98, f"{what}: {share:.0%} of the patches belong, which compares nothing"
    differing = int(((found != expected) & decided).sum())
    if differing:
        raise Wrong(f"{what} differ from the plain form's in {differing:,} of {expected.numel():,} patches")
