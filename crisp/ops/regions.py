"""Region discovery and warping, each with a plain torch form and a Triton kernel: who runs is chosen here.

`crisp.regions` has the three functions as the paper tells them; the training step calls `discover_and_warp`,
which is two kernel launches and never waits for the device. No gradient flows through any of it.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from crisp.config import WarpMode
from crisp.errors import CrispError
from crisp.ops import regions_torch, triton_support
from crisp.ops.triton_support import require_triton

Implementation = Literal["auto", "torch", "triton"]


class WarpedRegions(NamedTuple):
    """Regions of the reference, and where each view shows them."""

    regions: Tensor
    """[B, K, N] bool"""
    view_regions: Tensor
    """[V, B, K, n] bool"""
    counts: Tensor
    """[V, B, K] int32: patches of the region in the view"""


def resolve_implementation(
    device: torch.device, implementation: Implementation = "auto", *, mode: WarpMode = "centre"
) -> Literal["torch", "triton"]:
    """The form that runs for tensors on `device`, for a caller to log.

    "auto" takes Triton where tensors are on CUDA (and Triton is installed), plain torch elsewhere. Modes "forward"
    and "coverage" are warped by torch everywhere.

    Raises:
        CrispError: "triton" asked for where it cannot run, or in a mode that has no kernel.
    """
    if implementation == "auto":
        return "triton" if device.type == "cuda" and triton_support.HAS_TRITON and mode == "centre" else "torch"
    if implementation == "torch":
        return "torch"
    if implementation != "triton":
        raise CrispError(f"implementation {implementation!r}: unknown; use 'auto', 'torch' or 'triton'")
    if mode != "centre":
        raise CrispError(f"implementation 'triton': warp mode {mode!r} has no kernel; use 'auto' or 'torch'")
    require_triton("implementation 'triton'", device)
    return "triton"


@torch.no_grad()
def discover(tokens: Tensor, seeds: Tensor, *, threshold: float, implementation: Implementation = "auto") -> Tensor:
    """`crisp.regions.discover_regions`, with the choice of implementation.

    Args:
        tokens: [B, N, D] float16 | bfloat16 | float32, any strides.
        seeds: [B, K] int64.
        threshold: β.
        implementation: see `resolve_implementation`.

    Returns:
        [B, K, N] bool.

    Raises:
        CrispError: shapes that do not fit, or an implementation that cannot run here.
    """
    if tokens.ndim != 3 or seeds.ndim != 2 or len(tokens) != len(seeds):
        raise CrispError(
            f"tokens {list(tokens.shape)}, seeds {list(seeds.shape)}: need [B, N, D] and [B, K] of the same B"
        )
    if resolve_implementation(tokens.device, implementation) == "triton":
        from crisp.ops import regions_triton  # where there is no GPU, Triton is never imported

        return regions_triton.discover(tokens, seeds, threshold, regions_torch.MIN_NORM)
    return regions_torch.discover(tokens, seeds, threshold)


@torch.no_grad()
def warp(
    regions: Tensor,
    view_from_reference: Tensor,
    *,
    reference_grid: int,
    view_grid: int,
    patch_px: int,
    mode: WarpMode = "centre",
    min_coverage: float = 0.5,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """`crisp.regions.warp_regions` with its counts and the choice of implementation.

    Args:
        regions: [B, K, N] bool, N = reference_grid².
        view_from_reference: [V, B, 2, 3] float32, in pixels.
        reference_grid: Patches along a side of the reference.
        view_grid: Patches along a side of the views.
        patch_px: Side of a patch, of reference and views alike.
        mode: see `crisp.regions.warp_regions`.
        min_coverage: τ of mode "coverage".
        implementation: see `resolve_implementation`.

    Returns:
        View regions [V, B, K, n] bool, n = view_grid², and their sizes [V, B, K] int32.

    Raises:
        CrispError: shapes that do not fit, an unknown mode, an implementation that cannot run here; in mode
            "coverage" a map with rotation or shear.
    """
    _require_warpable(regions, view_from_reference, reference_grid)
    if resolve_implementation(regions.device, implementation, mode=mode) == "triton":
        from crisp.ops import regions_triton

        return regions_triton.warp_centre(regions, view_from_reference, reference_grid, view_grid, patch_px)
    if mode == "centre":
        view_regions = regions_torch.warp_centre(
            regions, view_from_reference, reference_grid=reference_grid, view_grid=view_grid, patch_px=patch_px
        )
    elif mode == "forward":
        view_regions = regions_torch.warp_forward(
            regions, view_from_reference, reference_grid=reference_grid, view_grid=view_grid, patch_px=patch_px
        )
    elif mode == "coverage":
        view_regions = regions_torch.warp_coverage(
            regions,
            view_from_reference,
            reference_grid=reference_grid,
            view_grid=view_grid,
            patch_px=patch_px,
            min_coverage=min_coverage,
        )
    else:
        raise CrispError(f"warp mode {mode!r}: unknown; use 'centre', 'forward' or 'coverage'")
    return view_regions, view_regions.sum(-1, dtype=torch.int32)


def discover_and_warp(
    tokens: Tensor,
    seeds: Tensor,
    view_from_reference: Tensor,
    *,
    threshold: float,
    reference_grid: int,
    view_grid: int,
    patch_px: int,
    mode: WarpMode = "centre",
    min_coverage: float = 0.5,
    implementation: Implementation = "auto",
) -> WarpedRegions:
    """From teacher tokens of the reference to each region's mask and size in every view: `discover`, then `warp`.

    On CUDA in mode "centre": two launches, no copy of the tokens, no wait for the device. Arguments and errors are
    those of `discover` and `warp`. An explicit "triton" holds for both.
    """
    regions = discover(tokens, seeds, threshold=threshold, implementation=implementation)
    view_regions, counts = warp(
        regions,
        view_from_reference,
        reference_grid=reference_grid,
        view_grid=view_grid,
        patch_px=patch_px,
        mode=mode,
        min_coverage=min_coverage,
        implementation=implementation,
    )
    return WarpedRegions(regions, view_regions, counts)


def _require_warpable(regions: Tensor, view_from_reference: Tensor, reference_grid: int) -> None:
    if regions.ndim != 3 or regions.dtype != torch.bool or regions.shape[2] != reference_grid**2:
        raise CrispError(
            f"regions {list(regions.shape)} {regions.dtype}: need [B, K, {reference_grid**2}] bool for a reference "
            f"of {reference_grid}×{reference_grid} patches"
        )
    images = len(regions)
    if view_from_reference.ndim != 4 or view_from_reference.shape[1:] != (images, 2, 3):
        raise CrispError(
            f"view_from_reference {list(view_from_reference.shape)}: need [V, {images}, 2, 3] for {images} images"
        )
    if view_from_reference.dtype != torch.float32:
        raise CrispError(f"view_from_reference is {view_from_reference.dtype}: half precision cannot hold pixels")
