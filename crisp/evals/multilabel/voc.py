"""PASCAL VOC 2012 as VOCtrainval_11-May-2012.tar unpacks: VOCdevkit/VOC2012/{Annotations,ImageSets/Main,JPEGImages}."""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from crisp.errors import CrispError
from crisp.evals.images import FileImages
from crisp.evals.multilabel.data import IGNORED, MultiLabelImages, MultiLabelSet, check_positives
from crisp.evals.multilabel.protocol import VOC_CLASSES

USUAL_PLACES = ("", "VOC2012", "VOCdevkit/VOC2012", "voc2012/VOCdevkit/VOC2012", "voc/VOCdevkit/VOC2012", "voc2012")


def find_voc2012_multilabel(root: Path) -> Path | None:
    """The folder VOC2012 at or below `root`, for `open_voc2012`; None if there is none."""
    for usual in USUAL_PLACES:
        place = root / usual
        if (place / "Annotations").is_dir() and (place / "ImageSets/Main/train.txt").is_file():
            return place
    return None


def open_voc2012(place: Path) -> MultiLabelSet:
    """The splits train and val of the classification task.

    A class is present if an object of it is not marked difficult, and ignored for the image if all of them are.

    Raises:
        CrispError: a missing list, annotation or image, an unknown class, a class without example.
    """
    return MultiLabelSet(name="voc2012", train=_split(place, "train"), val=_split(place, "val"))


def _split(place: Path, split: str) -> MultiLabelImages:
    path = place / "ImageSets/Main" / f"{split}.txt"
    try:
        names = path.read_text().split()
    except OSError as error:
        raise CrispError(f"{path}: {error.strerror}; unpack VOCtrainval_11-May-2012.tar") from error
    if not names:
        raise CrispError(f"{path}: names no images; unpack VOCtrainval_11-May-2012.tar again")
    targets = np.zeros((len(names), len(VOC_CLASSES)), np.int8)
    number = {name: column for column, name in enumerate(VOC_CLASSES)}
    for row, name in enumerate(names):
        annotation = place / "Annotations" / f"{name}.xml"
        for found, difficult in _objects(annotation):
            if found not in number:
                raise CrispError(f"{annotation}: object {found!r} is none of VOC's {len(VOC_CLASSES)} classes")
            column = number[found]
            if not difficult:
                targets[row, column] = 1
            elif targets[row, column] == 0:
                targets[row, column] = IGNORED
    source = FileImages(place, [f"JPEGImages/{name}.jpg" for name in names])
    images = MultiLabelImages(source=source, targets=targets, classes=VOC_CLASSES)
    check_positives(images, f"{place} {split}")
    return images


def _objects(annotation: Path) -> list[tuple[str, bool]]:
    """Class and difficulty of each object."""
    try:
        tree = ET.parse(annotation)
    except OSError as error:
        raise CrispError(f"{annotation}: {error.strerror}; unpack VOCtrainval_11-May-2012.tar again") from error
    except ET.ParseError as error:
        raise CrispError(f"{annotation}: not XML ({error}); unpack VOCtrainval_11-May-2012.tar again") from error
    return [
        ((found.findtext("name") or "").strip(), (found.findtext("difficult") or "0").strip() == "1")
        for found in tree.getroot().findall("object")
    ]
