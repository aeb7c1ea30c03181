"""ADE20K as the SceneParsing archive (ADEChallengeData2016.zip) unpacks: 150 classes, label 0 for everything else."""

from pathlib import Path

from crisp.errors import CrispError
from crisp.evals.segmentation import protocol
from crisp.evals.segmentation.data import Labels, Pair, SegmentationData, Split, checked, first_that, list_files, places


def find_ade20k(root: Path) -> Path | None:
    """The folder with `images/training` and `annotations/training`, at `root` or right below; None if there is none."""
    return first_that(
        lambda folder: (folder / "images/training").is_dir() and (folder / "annotations/training").is_dir(),
        places(root, "ADEChallengeData2016"),
    )


def open_ade20k(root: Path) -> SegmentationData:
    """Training and validation images with their masks.

    Raises:
        CrispError: another layout, or a file that is missing.
    """
    folder = find_ade20k(root)
    if folder is None:
        raise CrispError(
            f"{root}: neither this folder nor one in it holds images/training and annotations/training; give the "
            f"ADEChallengeData2016 folder that the SceneParsing archive unpacks to"
        )
    classes = tuple(range(1, protocol.ADE20K_CLASSES + 1))
    return checked(
        SegmentationData(
            name="ADE20K",
            slug="ade20k",
            root=folder,
            train=_split(folder, "training", protocol.ADE20K_TRAIN),
            val=_split(folder, "validation", protocol.ADE20K_VAL),
            labels=Labels(known=(*classes, *protocol.ADE20K_IGNORED), ignored=protocol.ADE20K_IGNORED, classes=classes),
        )
    )


def _split(folder: Path, name: str, official: int) -> Split:
    images = list_files(folder / "images" / name, (".jpg",))
    masks = folder / "annotations" / name
    pairs = (Pair(name=path.stem, image=path, mask=masks / f"{path.stem}.png") for path in images)
    return Split(name=name, pairs=tuple(pairs), official=official)
