"""Images whose tokens are known, and their masks: a mask's segments may cut patches."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crisp.models.frozen import BlockTokens, FrozenBackbone, FrozenModel

PATCH_PX, GRID = 16, 4
SIDE_PX = PATCH_PX * GRID


class OracleBackbone(FrozenBackbone):
    """The gray value of each patch's middle, one-hot, or one vector for all patches (`constant`); two equal blocks."""

    def __init__(self, *, constant: bool = False) -> None:
        super().__init__()
        self.dim, self.depth, self.patch_px, self.native_px = 256, 2, PATCH_PX, SIDE_PX
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.constant, self.seen = constant, 0

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        self.seen += len(images)
        middle = self.patch_px // 2
        gray = images[:, 0, middle :: self.patch_px, middle :: self.patch_px].flatten(1)
        values = (gray * 255).round().long()
        if self.constant:
            values = torch.zeros_like(values)
        return [BlockTokens(cls=None, patches=torch.nn.functional.one_hot(values, 256).float())] * last


def oracle_model(*, constant: bool = False) -> FrozenModel:
    return FrozenModel(
        backbone=OracleBackbone(constant=constant),
        name="oracle",
        source="oracle:",
        fingerprint=f"oracle-{constant}",
        account="",
    )


def striped_mask(number: int) -> NDArray[np.uint8]:
    """[SIDE, SIDE] with ids 1 and 2 on the left and right of an edge that cuts the patches of a column."""
    mask = np.full((SIDE_PX, SIDE_PX), 2, np.uint8)
    mask[:, : PATCH_PX * 2 + 4 + number] = 1  # the third column's patches are mostly 2
    return mask


def write_masked(root: Path, masks: list[NDArray[np.uint8]], *, below: str = "") -> Path:
    """ROOT/images and ROOT/annotations. An image shows each patch's label as its gray."""
    for number, mask in enumerate(masks):
        blocks = mask.reshape(GRID, PATCH_PX, GRID, PATCH_PX).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
        modes = np.array([[np.bincount(patch).argmax() for patch in row] for row in blocks])
        image = np.kron(modes, np.ones((PATCH_PX, PATCH_PX))).astype(np.uint8)
        for folder, pixels in (("images", np.stack([image] * 3, axis=-1)), ("annotations", mask)):
            target = root / folder / below / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
    return root
