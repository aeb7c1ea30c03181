"""Regions: found once in the reference, then followed into the views (paper, sections 3.1 and 3.2).

Every function runs as a Triton kernel on CUDA where there is one and as plain torch elsewhere (`crisp.ops.regions`
chooses, and has the two in one for the training step). Nothing here carries a gradient.
"""

from torch import Tensor

from crisp.config import WarpMode
from crisp.ops import regions as ops


def discover_regions(tokens: Tensor, seeds: Tensor, *, threshold: float) -> Tensor:
    """Patches of the reference that resemble a seed patch (Eq. 1 and 2).

        a_s(i) = ⟨z_s, z_i⟩ / (‖z_s‖ ‖z_i‖)        M(i) = 1[a_s(i) ≥ β]

    Computed in float32 whatever the type of the tokens and under autocast. The seed always belongs, also where
    rounding or β = 1 would leave it out; a zero vector has similarity 0 to everything.

    Args:
        tokens: [B, N, D] float16 | bfloat16 | float32, z: patch tokens of the reference, any strides.
        seeds: [B, K] int64, s: a reference patch in 0..N−1 (on CUDA not checked: that would wait for the device).
        threshold: β.

    Returns:
        [B, K, N] bool.

    Raises:
        CrispError: shapes that do not fit.
    """
    return ops.discover(tokens, seeds, threshold=threshold)


def warp_regions(
    regions: Tensor,
    view_from_reference: Tensor,
    *,
    reference_grid: int,
    view_grid: int,
    patch_px: int,
    mode: WarpMode = "centre",
    min_coverage: float = 0.5,
) -> Tensor:
    """The patches of each view that show a region of the reference (section 3.2; M → M_k).

    The paper maps coordinates and then "discretises into the patch grid", which can be read in three ways:

    - "centre": a view patch belongs when its centre, through the inverse map, lies in an active cell. The same as
      mapping each active cell's rectangle and testing centres: no holes. Any invertible affine.
    - "forward": a view patch belongs when the centre of an active cell lands in it. The most literal reading;
      leaves holes where the crop zooms in. Any affine.
    - "coverage": a view patch belongs when active cells cover at least `min_coverage` of its area, exactly. Maps of
      flip, scale and shift only, as crops are; looking whether they are waits once for the device.

    What a view shows of outside the reference belongs to no region. A cell holds its left and upper edge.

    Args:
        regions: [B, K, N] bool, N = reference_grid².
        view_from_reference: [V, B, 2, 3] float32, acting on (x, y, 1) in pixels (`crisp.geometry`).
        reference_grid: Patches along a side of the reference.
        view_grid: Patches along a side of the views.
        patch_px: Side of a patch, of reference and views alike.
        mode: How a region becomes a mask of view patches.
        min_coverage: τ of mode "coverage", in (0, 1].

    Returns:
        [V, B, K, n] bool, n = view_grid².

    Raises:
        CrispError: shapes that do not fit, an unknown mode; in mode "coverage" a map with rotation or shear.
    """
    view_regions, _ = ops.warp(
        regions,
        view_from_reference,
        reference_grid=reference_grid,
        view_grid=view_grid,
        patch_px=patch_px,
        mode=mode,
        min_coverage=min_coverage,
    )
    return view_regions


def visible_in_both(view_regions: Tensor, *, min_patches: int) -> Tensor:
    """Whether both global views hold at least t patches of a region; the others take no part in the loss.

    Args:
        view_regions: [2, B, K, n] bool.
        min_patches: t.

    Returns:
        [B, K] bool.
    """
    return (view_regions.sum(-1) >= min_patches).all(0)
