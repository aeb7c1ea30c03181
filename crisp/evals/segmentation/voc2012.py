"""PASCAL VOC 2012 as VOCtrainval_11-May-2012.tar unpacks, and the Semantic Boundaries Dataset's masks beside it.

Train sets: `train`, VOC's 1,464 images; `trainaug`, the 10,582 of VOC train and all of SBD without VOC val, each with
VOC's own mask where there is one; `capi`, the list in CAPI's code: VOC train and all of SBD, which holds images of VOC
val, and those of VOC train that SBD has a second time with SBD's mask.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from crisp.errors import CrispError
from crisp.evals.segmentation import protocol
from crisp.evals.segmentation.data import (
    Labels,
    Pair,
    SegmentationData,
    Split,
    checked,
    first_that,
    list_files,
    places,
    read_list,
)

VocTrain = Literal["train", "trainaug", "capi"]

NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

AUG_FOLDER = "SegmentationClassAug"
SBD_FOLDER = "benchmark_RELEASE/dataset"


def find_voc2012(root: Path) -> Path | None:
    """The folder VOC2012, at `root` or below as the archive unpacks; None if there is none."""
    return first_that(
        lambda folder: (folder / "ImageSets/Segmentation/train.txt").is_file() and (folder / "JPEGImages").is_dir(),
        places(root, "VOC2012", "VOCdevkit/VOC2012"),
    )


def find_sbd(voc: Path, sbd: Path | None = None) -> Path | None:
    """SBD's masks: its own release (`dataset` with cls/*.mat and lists) or a folder of PNGs, SegmentationClassAug.

    Args:
        voc: the folder VOC2012.
        sbd: where to look; default: in VOC2012, and for the release up to three folders above.
    """
    if sbd is not None:
        below = (sbd, sbd / "dataset", sbd / SBD_FOLDER, sbd / AUG_FOLDER)
        return first_that(_is_sbd, below)
    above = [folder / SBD_FOLDER for folder in (voc, *voc.resolve().parents[:3])]
    return first_that(_is_sbd, (voc / AUG_FOLDER, *above))


def _is_sbd(folder: Path) -> bool:
    return _is_release(folder) or (folder.name == AUG_FOLDER and folder.is_dir())


def _is_release(folder: Path) -> bool:
    return (folder / "cls").is_dir() and (folder / "train.txt").is_file()


def open_voc2012(root: Path, train: VocTrain = "trainaug", sbd: Path | None = None) -> SegmentationData:
    """One of the train sets, and VOC val, with background as a class.

    Args:
        root: where VOC2012 is, see `find_voc2012`.
        train: which train set.
        sbd: where SBD is, see `find_sbd`; for `trainaug` and `capi`.

    Raises:
        CrispError: another layout, SBD is wanted and not there, a file is missing, or scipy for SBD's .mat files.
    """
    voc = find_voc2012(root)
    if voc is None:
        raise CrispError(
            f"{root}: holds no VOC2012 with ImageSets/Segmentation and JPEGImages; give the VOCdevkit folder that "
            f"VOCtrainval_11-May-2012.tar unpacks to"
        )
    lists = voc / "ImageSets/Segmentation"
    own, val = read_list(lists / "train.txt"), read_list(lists / "val.txt")
    pairs = _own_pairs(voc, own)
    note = ""
    if train != "train":
        masks = find_sbd(voc, sbd)
        if masks is None:
            raise CrispError(
                f"{sbd or voc}: no masks of SBD for the train set {train}; unpack its benchmark.tgz beside, name "
                f"{SBD_FOLDER} or a {AUG_FOLDER} folder with --sbd, or take --train-set train"
            )
        if train == "trainaug":
            wanted = sorted(set(_sbd_names(masks)) - set(own) - set(val))
            pairs += _sbd_pairs(masks, wanted, voc / "JPEGImages")
        else:
            if not _is_release(masks):
                raise CrispError(f"{masks}: has no lists; --train-set capi needs SBD's own release, {SBD_FOLDER}")
            names = _sbd_names(masks)
            pairs += _sbd_pairs(masks, names, masks / "img")
            note = (
                f"train set capi: {len(set(names) & set(val))} of its {len(pairs)} images are in VOC val, on which it "
                f"is scored; take trainaug for a clean score"
            )
    official = {"train": protocol.VOC_TRAIN, "trainaug": protocol.VOC_TRAINAUG, "capi": None}[train]
    classes = tuple(range(protocol.VOC_CLASSES))
    return checked(
        SegmentationData(
            name="PASCAL VOC 2012",
            slug="voc2012",
            root=voc,
            train=Split(name=train, pairs=tuple(pairs), official=official),
            val=Split(name="val", pairs=tuple(_own_pairs(voc, val)), official=protocol.VOC_VAL),
            labels=Labels(
                known=(*classes, *protocol.VOC_IGNORED), ignored=protocol.VOC_IGNORED, classes=classes, names=NAMES
            ),
            note=note,
        )
    )


def _own_pairs(voc: Path, names: Iterable[str]) -> list[Pair]:
    images, masks = voc / "JPEGImages", voc / "SegmentationClass"
    return [Pair(name=name, image=images / f"{name}.jpg", mask=masks / f"{name}.png") for name in names]


def _sbd_names(masks: Path) -> list[str]:
    """All images of SBD: its train and val lists, which share none, or the PNGs that are there."""
    if not _is_release(masks):
        return [path.stem for path in list_files(masks, (".png",))]
    return read_list(masks / "train.txt") + read_list(masks / "val.txt")


def _sbd_pairs(masks: Path, names: Iterable[str], images: Path) -> list[Pair]:
    of_mask = "cls/{}.mat" if _is_release(masks) else "{}.png"
    if _is_release(masks):
        _check_scipy()
    return [Pair(name=name, image=images / f"{name}.jpg", mask=masks / of_mask.format(name)) for name in names]


def _check_scipy() -> None:
    try:
        import scipy.io  # noqa: F401
    except ImportError as error:
        raise CrispError(
            f"SBD's masks are .mat files, and scipy is not installed; pip install crisp-ssl[devkit], or give a "
            f"{AUG_FOLDER} folder of PNGs"
        ) from error
