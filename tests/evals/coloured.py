"""Tiny labelled images whose class is their colour, and models whose features are perfect or say nothing."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crisp.evals.images import FileImages
from crisp.models.frozen import BlockTokens, FrozenBackbone, FrozenModel

COLOURS = ((220, 40, 40), (40, 200, 40), (40, 40, 220), (220, 220, 40), (40, 220, 220))
WORDNET_IDS = ("n01440764", "n02102040", "n02979186", "n03000684", "n03028079")


def coloured(colour: tuple[int, int, int], seed: int, *, side_px: int = 40) -> NDArray[np.uint8]:
    """[side, side + 6, 3] of a colour with a little noise."""
    noise = np.random.default_rng(seed).integers(-20, 21, (side_px, side_px + 6, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def class_folders(root: Path, *, classes: int = 3, train: int = 4, val: int = 2) -> Path:
    """ImageNet's layout: root/{train,val}/nXXXXXXXX/*.JPEG; returns `root`."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / WORDNET_IDS[label]
            folder.mkdir(parents=True)
            for i in range(count):
                stem = f"{WORDNET_IDS[label]}_{i}" if split == "train" else f"ILSVRC2012_val_{label * val + i:08d}"
                seed = 1000 * (split == "val") + 100 * label + i
                Image.fromarray(coloured(COLOURS[label], seed)).save(folder / f"{stem}.JPEG", quality=90)
    return root


class ColourBackbone(FrozenBackbone):
    """CLS and patches are one-hot by which of `COLOURS` is nearest to the image's mean (or the patch's): perfect."""

    def __init__(self, *, constant: bool = False) -> None:
        super().__init__()
        self.dim, self.depth, self.patch_px, self.native_px = len(COLOURS), 4, 16, 224
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.constant = constant
        self.register_buffer("colours", torch.tensor(COLOURS) / 255)
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def _named(self, means: Tensor) -> Tensor:
        """[..., 3] → one-hot [..., D]."""
        if self.constant:
            return torch.ones(*means.shape[:-1], self.dim, device=means.device)
        nearest = torch.cdist(means, self.colours).argmin(-1)
        return torch.nn.functional.one_hot(nearest, self.dim).float() * self.scale

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        means = torch.nn.functional.avg_pool2d(images, self.patch_px).flatten(2).transpose(1, 2)  # [B, n, 3]
        tokens = BlockTokens(cls=self._named(means.mean(1)), patches=self._named(means))
        return [tokens] * last


def colour_model(*, constant: bool = False) -> FrozenModel:
    name = "constant" if constant else "colour"
    return FrozenModel(
        backbone=ColourBackbone(constant=constant), name=name, source=f"{name}:", fingerprint=name, account=""
    )


def files_in(folder: Path) -> FileImages:
    return FileImages(folder, sorted(path.name for path in folder.iterdir()))
