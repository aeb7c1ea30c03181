"""Small data sets in the layouts of the official archives, and models whose scores on them are known.

Every image is gray and as large as the evaluation wants it, each of its patches one value: the id in the mask's patch.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crisp.evals.segmentation.cityscapes import CLASS_IDS
from crisp.models.frozen import BlockTokens, FrozenBackbone, FrozenModel

PATCH_PX, GRID = 8, 4
SIDE_PX = PATCH_PX * GRID
PATCHES = GRID * GRID


class GrayBackbone(FrozenBackbone):
    """The gray value of each patch, one-hot (`perfect`), or the same vector for all patches.

    It counts the images that it sees, and fails after `fails_after` of them.
    """

    def __init__(self, *, perfect: bool, fails_after: int | None = None) -> None:
        super().__init__()
        self.dim, self.depth, self.patch_px, self.native_px = 256, 1, PATCH_PX, SIDE_PX
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.perfect, self.fails_after, self.seen = perfect, fails_after, 0

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        self.seen += len(images)
        if self.fails_after is not None and self.seen > self.fails_after:
            raise KeyboardInterrupt
        gray = torch.nn.functional.avg_pool2d(images[:, :1], self.patch_px).flatten(1)  # [B, n]
        values = (gray * 255).round().long()
        if not self.perfect:
            values = torch.full_like(values, 3)
        return [BlockTokens(cls=None, patches=torch.nn.functional.one_hot(values, 256).float())]


def gray_model(*, perfect: bool = True, fails_after: int | None = None) -> FrozenModel:
    return FrozenModel(
        backbone=GrayBackbone(perfect=perfect, fails_after=fails_after),
        name=f"gray {perfect}",
        source="gray:",
        fingerprint=f"gray-{perfect}",
        account="",
    )


def id_grids(ids: Iterable[int], images: int) -> list[NDArray[np.uint8]]:
    """[GRID, GRID] ids of patches for some images: all of `ids` in turn, each as often as the others."""
    ids = list(ids)
    total = images * PATCHES
    assert total % len(ids) == 0, f"{total} patches cannot hold {len(ids)} ids equally"
    # Neighbouring patches differ, and each image has its own mix.
    order = np.random.default_rng(0).permutation(np.resize(ids, total)).astype(np.uint8)
    return list(order.reshape(images, GRID, GRID))


def pixels(grid: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[SIDE_PX, SIDE_PX] of a grid of patches."""
    return np.kron(grid, np.ones((PATCH_PX, PATCH_PX), np.uint8))


def save_image(path: Path, grid: NDArray[np.uint8]) -> None:
    """An RGB image; a JPEG of flat gray blocks of 8 px at this quality is exact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(pixels(grid)).convert("RGB").save(path, **options)


def save_mask(path: Path, grid: NDArray[np.uint8], *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(pixels(grid))
    if palette:
        colours = np.random.default_rng(1).permutation(256)  # not the indices
        mask.putpalette(np.repeat(colours, 3).astype(np.uint8).tobytes())
        assert mask.mode == "P"
    mask.save(path)


def write_ade20k(root: Path, *, train: int = 75, val: int = 75) -> Path:
    """150 classes equally often: needs a multiple of 75 images."""
    folder = root / "ADEChallengeData2016"
    for split, short, count in (("training", "train", train), ("validation", "val", val)):
        for i, grid in enumerate(id_grids(range(1, 151), count), start=1):
            save_image(folder / "images" / split / f"ADE_{short}_{i:08}.jpg", grid)
            save_mask(folder / "annotations" / split / f"ADE_{short}_{i:08}.png", grid)
    return folder


def write_cityscapes(root: Path, *, train: int = 19, val: int = 19) -> Path:
    """19 classes equally often: needs a multiple of 19 images."""
    for split, cities, count in (("train", ("aachen", "bochum"), train), ("val", ("lindau",), val)):
        for i, grid in enumerate(id_grids(CLASS_IDS.values(), count)):
            city = cities[i % len(cities)]
            stem = f"{city}_{i:06}_000019"
            save_image(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", grid)
            for kind in ("labelIds", "instanceIds"):
                save_mask(root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", grid)
    return root


def write_voc2012(root: Path, *, own: int = 21, val: int = 21) -> Path:
    """21 classes equally often: needs a multiple of 21 images. JPEGImages holds some more, as in the archive."""
    voc = root / "VOCdevkit/VOC2012"
    for split, year, grids in (("train", 2007, id_grids(range(21), own)), ("val", 2008, id_grids(range(21), val))):
        names = [f"{year}_{i:06}" for i in range(len(grids))]
        for name, grid in zip(names, grids, strict=True):
            save_image(voc / "JPEGImages" / f"{name}.jpg", grid)
            save_mask(voc / "SegmentationClass" / f"{name}.png", grid, palette=True)
        (voc / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    save_image(voc / "JPEGImages" / "2009_000001.jpg", grids[0])
    return voc


SBD_ONLY = ("2010_000001", "2010_000002")
SBD_NAMES = {"train": ("2007_000000", "2010_000001", "2008_000003"), "val": ("2010_000002", "2008_000004")}
"""Of VOC train, of SBD alone, of VOC val"""


def write_sbd(voc: Path, root: Path, *, png: bool) -> Path:
    """SBD's release (`benchmark_RELEASE/dataset`), or a SegmentationClassAug folder; SBD's own images are in VOC, too.

    SBD's masks say 20 everywhere, so that it shows whose mask was taken.
    """
    names = [name for split in SBD_NAMES.values() for name in split]
    grid = np.full((GRID, GRID), 20, np.uint8)
    for name in SBD_ONLY:
        save_image(voc / "JPEGImages" / f"{name}.jpg", grid)
    if png:
        for name in names:
            save_mask(voc / "SegmentationClassAug" / f"{name}.png", grid)
        return voc / "SegmentationClassAug"
    from scipy.io import savemat

    folder = root / "benchmark_RELEASE/dataset"
    (folder / "cls").mkdir(parents=True)
    for split, members in SBD_NAMES.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in members))
    for name in names:
        save_image(folder / "img" / f"{name}.jpg", grid)
        savemat(folder / "cls" / f"{name}.mat", {"GTcls": {"Boundaries": 0, "Segmentation": pixels(grid)}})
    return folder


def write_folder(root: Path, *, ids: Iterable[int] = range(4), train: int = 12, val: int = 8) -> Path:
    for split, count in (("train", train), ("val", val)):
        for i, grid in enumerate(id_grids(ids, count)):
            save_image(root / "images" / split / f"{i}.png", grid)
            save_mask(root / "annotations" / split / f"{i}.png", grid)
    return root
