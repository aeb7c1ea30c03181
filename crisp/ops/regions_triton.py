"""Region discovery and centre warping as two Triton kernels, one launch each, registered as torch operators.

Arguments and results are those of `crisp.ops.regions`, which checks them. Registered, because `torch.compile`
then takes each operator as one opaque node and knows its result's shape.
Axis letters: B images, K seeds, V views, N reference patches, n view patches, D channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DISCOVER_BLOCK_N = 16
"""Patches per program: 13 programs for a seed on a 14×14 grid, so that a batch of 64 fills a large GPU."""

DISCOVER_BLOCK_D = 128
"""Channels per step: tile and accumulators take about 70 registers a thread at four warps, and spill nothing."""


@triton.jit
def discover_kernel(
    tokens: tl.tensor,
    seeds: tl.tensor,
    regions: tl.tensor,
    threshold: tl.tensor,
    K: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    MIN_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """BLOCK_N patches of one seed's region; grid (B·K, ⌈N / BLOCK_N⌉).

    Dot product and both norms come from one pass over the tokens as they lie in memory (any strides, any float
    type), accumulated in float32. A seed outside the grid is read as a zero vector: nothing resembles it.
    """
    row = tl.program_id(0)  # b·K + k
    patch = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    seed = tl.load(seeds + row)
    image_tokens = tokens + (row // K).to(tl.int64) * stride_b
    has_seed = (seed >= 0) & (seed < N)
    dot = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    patch_square = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    seed_square = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        z_seed = tl.load(
            image_tokens + seed * stride_n + channel * stride_d, mask=(channel < D) & has_seed, other=0.0
        ).to(tl.float32)
        z = tl.load(
            image_tokens + patch[:, None] * stride_n + channel[None, :] * stride_d,
            mask=(patch[:, None] < N) & (channel[None, :] < D),
            other=0.0,
        ).to(tl.float32)
        dot += z * z_seed[None, :]
        patch_square += z * z
        seed_square += z_seed * z_seed

    patch_norm = tl.maximum(tl.sqrt_rn(tl.sum(patch_square, axis=1)), MIN_NORM)
    seed_norm = tl.maximum(tl.sqrt_rn(tl.sum(seed_square, axis=0)), MIN_NORM)
    similarity = tl.div_rn(tl.sum(dot, axis=1), patch_norm * seed_norm)
    member = (similarity >= threshold) | (patch == seed)
    tl.store(regions + row.to(tl.int64) * N + patch, member, mask=patch < N)


@triton.jit
def warp_centre_kernel(
    regions: tl.tensor,
    view_from_reference: tl.tensor,
    view_regions: tl.tensor,
    counts: tl.tensor,
    B: tl.tensor,
    K: tl.tensor,
    patch_px: tl.tensor,
    REFERENCE_GRID: tl.constexpr,
    VIEW_GRID: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """All n ≤ BLOCK patches of one region in one view, and their number; grid (V·B·K,).

    Divisions round as torch's do, so that a centre on a cell's edge falls to the same side.
    """
    row = tl.program_id(0)  # (v·B + b)·K + k
    image = row // K % B
    entry = view_from_reference + (row // K) * 6
    a, b, x_shift = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    c, d, y_shift = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    determinant = a * d - b * c

    patch = tl.arange(0, BLOCK)
    x = ((patch % VIEW_GRID).to(tl.float32) + 0.5) * patch_px - x_shift
    y = ((patch // VIEW_GRID).to(tl.float32) + 0.5) * patch_px - y_shift
    cell_px = tl.zeros((BLOCK,), tl.float32) + patch_px
    reference_column = tl.floor(tl.div_rn(tl.div_rn(d * x - b * y, determinant), cell_px))
    reference_row = tl.floor(tl.div_rn(tl.div_rn(a * y - c * x, determinant), cell_px))

    inside = (reference_column >= 0) & (reference_column < REFERENCE_GRID)
    inside &= (reference_row >= 0) & (reference_row < REFERENCE_GRID) & (patch < VIEW_GRID * VIEW_GRID)
    cell = tl.where(inside, reference_row * REFERENCE_GRID + reference_column, 0.0).to(tl.int32)
    region = regions + (image * K + row % K).to(tl.int64) * (REFERENCE_GRID * REFERENCE_GRID)
    member = (tl.load(region + cell, mask=inside, other=0) != 0) & inside
    tl.store(
        view_regions + row.to(tl.int64) * (VIEW_GRID * VIEW_GRID) + patch, member, mask=patch < VIEW_GRID * VIEW_GRID
    )
    tl.store(counts + row, tl.sum(member.to(tl.int32), axis=0))


@torch.library.custom_op("crisp::discover_regions", mutates_args=())
def discover(tokens: Tensor, seeds: Tensor, threshold: float, min_norm: float) -> Tensor:
    """[B, N, D] float, [B, K] int64 → [B, K, N] bool, in one launch."""
    B, N, D = tokens.shape
    K = seeds.shape[1]
    regions = _empty_regions(tokens, seeds)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device, whatever its arguments live on
        discover_kernel[(B * K, triton.cdiv(N, DISCOVER_BLOCK_N))](
            tokens,
            seeds.contiguous(),
            regions,
            threshold,
            K,
            N,
            D,
            *tokens.stride(),
            MIN_NORM=min_norm,
            BLOCK_N=DISCOVER_BLOCK_N,
            BLOCK_D=DISCOVER_BLOCK_D,
        )
    return regions


@discover.register_fake
def _(tokens: Tensor, seeds: Tensor, threshold: float, min_norm: float) -> Tensor:
    return _empty_regions(tokens, seeds)


@torch.library.custom_op("crisp::warp_regions_centre", mutates_args=())
def warp_centre(
    regions: Tensor, view_from_reference: Tensor, reference_grid: int, view_grid: int, patch_px: int
) -> tuple[Tensor, Tensor]:
    """[B, K, N] bool, [V, B, 2, 3] float32 → [V, B, K, n] bool and [V, B, K] int32, in one launch."""
    view_regions, counts = _empty_view_regions(regions, view_from_reference, view_grid)
    with torch.cuda.device_of(regions):
        warp_centre_kernel[(counts.numel(),)](
            regions.contiguous(),
            view_from_reference.contiguous(),
            view_regions,
            counts,
            regions.shape[0],
            regions.shape[1],
            patch_px,
            REFERENCE_GRID=reference_grid,
            VIEW_GRID=view_grid,
            BLOCK=triton.next_power_of_2(view_grid**2),
        )
    return view_regions, counts


@warp_centre.register_fake
def _(
    regions: Tensor, view_from_reference: Tensor, reference_grid: int, view_grid: int, patch_px: int
) -> tuple[Tensor, Tensor]:
    return _empty_view_regions(regions, view_from_reference, view_grid)


def _empty_regions(tokens: Tensor, seeds: Tensor) -> Tensor:
    return torch.empty(*seeds.shape, tokens.shape[1], dtype=torch.bool, device=tokens.device)


def _empty_view_regions(regions: Tensor, view_from_reference: Tensor, view_grid: int) -> tuple[Tensor, Tensor]:
    rows = (len(view_from_reference), *regions.shape[:2])
    view_regions = torch.empty(*rows, view_grid**2, dtype=torch.bool, device=regions.device)
    return view_regions, torch.empty(rows, dtype=torch.int32, device=regions.device)
