"""Region discovery and warping in plain torch: the CPU path, and what the Triton kernels are tested against.

Arguments and results are those of `crisp.ops.regions`, which checks them; nothing here waits for the device,
with one exception: `warp_coverage`.
Axis letters: B images, K seeds, V views, N reference patches, n view patches, D channels.
"""

import torch
from torch import Tensor

from crisp.errors import CrispError

MIN_NORM = 1e-12
"""A token shorter than this has similarity 0 to everything, in place of NaN."""

OFF_AXIS_LIMIT_PX = 1e-3
"""Rotation or shear that moves no point of the reference by more than this counts as none."""

COVERAGE_SLACK = 1e-5
"""A float32 affine is off by a few millionths of a patch: that may not decide where coverage equals the threshold."""


def discover(tokens: Tensor, seeds: Tensor, threshold: float) -> Tensor:
    """Patches whose cosine similarity to the seed reaches the threshold: [B, K, N] bool.

    The products are summed elementwise rather than by a matrix product: that keeps float32 under autocast and
    under TF32, where a similarity would lose the digits that the threshold needs. Costs B·K·N·D floats of memory.
    """
    z_BND = tokens.float()
    norm_BN = z_BND.norm(dim=-1).clamp_min(MIN_NORM)
    seed_BKD = z_BND.gather(1, seeds[:, :, None].expand(-1, -1, z_BND.shape[2]))
    dot_BKN = (seed_BKD[:, :, None] * z_BND[:, None]).sum(-1)
    similarity_BKN = dot_BKN / (norm_BN.gather(1, seeds)[:, :, None] * norm_BN[:, None])
    return (similarity_BKN >= threshold).scatter(2, seeds[:, :, None], True)


def warp_centre(
    regions: Tensor, view_from_reference: Tensor, *, reference_grid: int, view_grid: int, patch_px: int
) -> Tensor:
    """View patches whose centre, taken back to the reference, lies in an active cell: [V, B, K, n] bool."""
    a, b, x_shift, c, d, y_shift = _entries(view_from_reference)  # each [V, B, 1]
    x, y = _centres(view_grid, patch_px, regions.device)
    x, y = x - x_shift, y - y_shift
    determinant = a * d - b * c  # 0 gives inf or NaN, which lies in no cell
    cell_VBn, inside_VBn = _cell_of(
        (d * x - b * y) / determinant, (a * y - c * x) / determinant, reference_grid, patch_px
    )
    views, images, seeds = len(view_from_reference), *regions.shape[:2]
    gathered_VBKn = regions.expand(views, -1, -1, -1).gather(3, cell_VBn[:, :, None].expand(views, images, seeds, -1))
    return gathered_VBKn & inside_VBn[:, :, None]


def warp_forward(
    regions: Tensor, view_from_reference: Tensor, *, reference_grid: int, view_grid: int, patch_px: int
) -> Tensor:
    """View patches that the centre of an active cell lands in: [V, B, K, n] bool."""
    a, b, x_shift, c, d, y_shift = _entries(view_from_reference)
    x, y = _centres(reference_grid, patch_px, regions.device)
    patch_VBN, inside_VBN = _cell_of(a * x + b * y + x_shift, c * x + d * y + y_shift, view_grid, patch_px)
    lands_VBKN = regions & inside_VBN[:, :, None]
    nowhere = view_grid**2  # one more patch, cut off again, takes what lands outside
    target_VBKN = torch.where(lands_VBKN, patch_VBN[:, :, None], nowhere)
    marked = lands_VBKN.new_zeros(*lands_VBKN.shape[:3], nowhere + 1)
    return marked.scatter_(3, target_VBKN, True)[..., :nowhere]


def warp_coverage(
    regions: Tensor,
    view_from_reference: Tensor,
    *,
    reference_grid: int,
    view_grid: int,
    patch_px: int,
    min_coverage: float,
) -> Tensor:
    """View patches of whose area active cells cover at least `min_coverage`: [V, B, K, n] bool.

    A flip, a shift and a scale per axis keep rectangles upright, so the share of patch (r, c) that active cells
    cover is Σ_ij Y[r, i] · M[i, j] · X[c, j], with Y and X the shares of its sides. In float64: exact for any mask,
    and out of reach of autocast and TF32.

    Raises:
        CrispError: a map with rotation or shear. Looking costs one wait for the device per call.
    """
    off_axis_px = _off_axis_px(view_from_reference, reference_grid * patch_px)
    if off_axis_px > OFF_AXIS_LIMIT_PX:
        raise CrispError(
            f"view_from_reference turns or shears (by up to {off_axis_px:.3g} px): warp mode 'coverage' takes "
            f"axis-aligned maps only; use mode 'centre' or 'forward'"
        )
    a, _, x_shift, _, d, y_shift = _entries(view_from_reference.double())
    columns_VBnN = _side_shares(a, x_shift, reference_grid, view_grid, patch_px)[:, :, None]  # [V, B, 1, g, G]
    rows_VBnN = _side_shares(d, y_shift, reference_grid, view_grid, patch_px)[:, :, None]
    active = regions.unflatten(2, (reference_grid, reference_grid)).double()  # [B, K, G, G]
    share = rows_VBnN @ active @ columns_VBnN.mT  # [V, B, K, g, g]
    return (share + COVERAGE_SLACK >= min_coverage).flatten(3)


def _off_axis_px(view_from_reference: Tensor, side_px: int) -> float:
    off_axis = torch.stack([view_from_reference[..., 0, 1], view_from_reference[..., 1, 0]])
    return float(off_axis.abs().max()) * side_px


def _side_shares(scale: Tensor, shift: Tensor, reference_grid: int, view_grid: int, patch_px: int) -> Tensor:
    """Share of each view patch's side that lies in each reference cell; scale and shift [V, B, 1] → [V, B, g, G]."""
    edges = torch.arange(view_grid + 1, dtype=scale.dtype, device=scale.device) * patch_px
    edges = (edges - shift) / scale / patch_px  # [V, B, g + 1] in reference cells
    low = torch.minimum(edges[..., :-1], edges[..., 1:])[..., None]  # a flip turns the two round
    high = torch.maximum(edges[..., :-1], edges[..., 1:])[..., None]
    cell = torch.arange(reference_grid, dtype=scale.dtype, device=scale.device)
    overlap = torch.minimum(high, cell + 1) - torch.maximum(low, cell)
    return overlap.clamp_min(0) / (high - low)


def _entries(view_from_reference: Tensor) -> tuple[Tensor, ...]:
    """(a, b, x_shift, c, d, y_shift), each [V, B, 1], of x' = a·x + b·y + x_shift and y' = c·x + d·y + y_shift."""
    return view_from_reference.flatten(2).split(1, dim=2)


def _centres(grid: int, patch_px: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres (x, y) of a grid's patches, row by row: [grid²] float32 each."""
    patch = torch.arange(grid**2, device=device)
    x = (patch % grid + 0.5) * patch_px
    y = (patch.div(grid, rounding_mode="floor") + 0.5) * patch_px
    return x, y


def _cell_of(x: Tensor, y: Tensor, grid: int, patch_px: int) -> tuple[Tensor, Tensor]:
    """Index of the patch that holds each point (0 for a point outside), int64, and whether there is one, bool."""
    column, row = (x / patch_px).floor(), (y / patch_px).floor()
    inside = (column >= 0) & (column < grid) & (row >= 0) & (row < grid)
    return torch.where(inside, row * grid + column, 0).long(), inside
