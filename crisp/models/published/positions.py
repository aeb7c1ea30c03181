"""Patch grids: those of images, and how position embeddings of one become those of another.

Each system's code has its own way of the latter.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from crisp.errors import CrispError

PositionRule = Literal["scale .1", "size", "size, antialias"]
"""Bicubic each. `scale .1`: by the factor (n + .1) / N per side, which also enters the sampling positions (DINO, and
what came of it). `size`: to n patches. `size, antialias`: likewise, smoothed where the grid shrinks."""


def resize_positions(table: Tensor, grid: tuple[int, int], rule: PositionRule) -> Tensor:
    """Position embeddings of patches for another grid, computed in float32.

    Args:
        table: [1, N, D] of a square grid, row by row, without CLS.
        grid: rows and columns wanted.
        rule: see `PositionRule`.

    Returns:
        [1, rows · columns, D], `table` itself for the grid that it has.
    """
    side = math.isqrt(table.shape[1])
    if grid == (side, side):
        return table
    base = table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, side, side]
    if rule == "scale .1":
        factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        resized = F.interpolate(base, scale_factor=factors, mode="bicubic")
    else:
        resized = F.interpolate(base, size=grid, mode="bicubic", antialias=rule == "size, antialias")
    return resized.flatten(2).transpose(1, 2).to(table.dtype)


def patch_grid(images: Tensor, patch_px: int) -> tuple[int, int]:
    """Rows and columns of patches of images [B, 3, H, W].

    Raises:
        CrispError: a side is no multiple of the patch.
    """
    height, width = images.shape[-2:]
    if height % patch_px or width % patch_px:
        raise CrispError(f"images of {height}×{width} px: the model has patches of {patch_px}; give multiples of that")
    return height // patch_px, width // patch_px


def check_last(last: int, depth: int) -> None:
    """Refuse a number of last blocks that the model does not have.

    Raises:
        CrispError: it is not in 1 to `depth`.
    """
    if not 1 <= last <= depth:
        raise CrispError(f"the last {last} blocks: the model has {depth}; take 1 to {depth}")


def grid_side(patches: int, *, source: str) -> int:
    """Side of the square grid of `patches` position embeddings.

    Raises:
        CrispError: they are no square.
    """
    side = math.isqrt(patches)
    if side * side != patches or side == 0:
        raise CrispError(f"{source}: {patches} position embeddings of patches make no square; the file is damaged")
    return side


def all_finite(tensor: Tensor) -> bool:
    """Whether it holds no NaN and no infinity; tensors without data pass."""
    return tensor.is_meta or bool(torch.isfinite(tensor).all())
