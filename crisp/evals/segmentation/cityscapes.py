"""Cityscapes as leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip unpack: 19 classes made of 34 label ids."""

from pathlib import Path

import numpy as np

from crisp.errors import CrispError
from crisp.evals.segmentation import protocol
from crisp.evals.segmentation.data import Labels, Pair, SegmentationData, Split, checked, first_that, list_files, places

VOID = 255
LABEL_IDS = 34
"""labelIds run from 0 to 33; the licence plates, −1, are not drawn"""
CLASS_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
"""Label id of each train id, in their order"""

IMAGE_ENDING, MASK_ENDING = "_leftImg8bit.png", "_gtFine_labelIds.png"


def find_cityscapes(root: Path) -> Path | None:
    """The folder with `leftImg8bit/train` and `gtFine/train`, at `root` or right below; None if there is none."""
    return first_that(
        lambda folder: (folder / "leftImg8bit/train").is_dir() and (folder / "gtFine/train").is_dir(),
        places(root),
    )


def open_cityscapes(root: Path) -> SegmentationData:
    """Train and val images with their fine masks, label ids turned to train ids and the others to 255.

    Raises:
        CrispError: another layout, or a file that is missing.
    """
    folder = find_cityscapes(root)
    if folder is None:
        raise CrispError(
            f"{root}: neither this folder nor one in it holds leftImg8bit/train and gtFine/train; unpack "
            f"leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip into one folder"
        )
    table = np.full(256, VOID, np.uint8)
    table[list(CLASS_IDS.values())] = np.arange(protocol.CITYSCAPES_CLASSES)
    return checked(
        SegmentationData(
            name="Cityscapes",
            slug="cityscapes",
            root=folder,
            train=_split(folder, "train", protocol.CITYSCAPES_TRAIN),
            val=_split(folder, "val", protocol.CITYSCAPES_VAL),
            labels=Labels(
                table=table,
                known=tuple(range(LABEL_IDS)),
                ignored=protocol.CITYSCAPES_IGNORED,
                classes=tuple(range(protocol.CITYSCAPES_CLASSES)),
                names=tuple(CLASS_IDS),
            ),
        )
    )


def _split(folder: Path, name: str, official: int) -> Split:
    images, masks = folder / "leftImg8bit" / name, folder / "gtFine" / name
    if not images.is_dir():
        raise CrispError(f"{images}: there is no such folder; unpack the whole archive")
    pairs = []
    for city in sorted(p for p in images.iterdir() if p.is_dir()):
        for path in list_files(city, (".png",)):
            if not path.name.endswith(IMAGE_ENDING):
                raise CrispError(f"{path}: is not named …{IMAGE_ENDING}; keep the archive's names")
            stem = path.name.removesuffix(IMAGE_ENDING)
            mask = masks / city.name / f"{stem}{MASK_ENDING}"
            pairs.append(Pair(name=f"{city.name}/{stem}", image=path, mask=mask))
    return Split(name=name, pairs=tuple(pairs), official=official)
