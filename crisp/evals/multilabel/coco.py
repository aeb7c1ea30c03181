"""COCO 2014 and 2017 as the official archives unpack.

{train,val}YEAR/*.jpg and annotations/instances_{train,val}YEAR.json.
"""

from pathlib import Path
from typing import Any

from crisp.errors import CrispError
from crisp.evals.images import FileImages
from crisp.evals.multilabel.data import (
    MultiLabelImages,
    MultiLabelSet,
    check_positives,
    read_annotations,
    targets_from_pairs,
)

USUAL_PLACES = ("", "coco", "COCO", "coco{year}", "COCO{year}", "mscoco")
IMAGE_FOLDERS = ("{split}{year}", "images/{split}{year}")
"""As the archives unpack side by side, and as many keep them"""


def find_coco2014(root: Path) -> Path | None:
    """The folder of COCO 2014 at or below `root`, for `open_coco`; None if there is none."""
    return _find(root, 2014)


def find_coco2017(root: Path) -> Path | None:
    """Of COCO 2017, likewise."""
    return _find(root, 2017)


def _find(root: Path, year: int) -> Path | None:
    for usual in USUAL_PLACES:
        place = root / usual.format(year=year)
        if all((place / f"annotations/instances_{split}{year}.json").is_file() for split in ("train", "val")):
            return place
    return None


def open_coco(place: Path, year: int) -> MultiLabelSet:
    """Train and val of an edition.

    A class is present if any object of it is annotated, crowds too. Images without any object stay in, as negatives.

    Raises:
        CrispError: a missing annotation file or image, an unknown category or image id, a class without example,
            categories that differ between the two.
    """
    train, val = (_split(place, split, year) for split in ("train", "val"))
    if train.classes != val.classes:
        raise CrispError(f"{place}: the categories of train and val differ; unpack one edition's annotations")
    return MultiLabelSet(name=f"coco{year}", train=train, val=val)


def _split(place: Path, split: str, year: int) -> MultiLabelImages:
    path = place / f"annotations/instances_{split}{year}.json"
    content = read_annotations(path)
    try:
        return _images(content, path, place, split, year)
    except (KeyError, TypeError) as error:
        raise CrispError(f"{path}: not COCO's instances ({error!r}); download the annotations again") from error


def _images(content: Any, path: Path, place: Path, split: str, year: int) -> MultiLabelImages:
    categories = sorted(content["categories"], key=lambda category: category["id"])
    column = {category["id"]: number for number, category in enumerate(categories)}
    images = sorted(content["images"], key=lambda image: image["id"])
    row = {image["id"]: number for number, image in enumerate(images)}
    if not images:
        raise CrispError(f"{path}: names no images; download the annotations again")
    for annotation in content["annotations"]:
        if annotation["category_id"] not in column:
            raise CrispError(f"{path}: annotation {annotation['id']} has unknown category {annotation['category_id']}")
        if annotation["image_id"] not in row:
            raise CrispError(f"{path}: annotation {annotation['id']} has unknown image {annotation['image_id']}")
    pairs = [(row[found["image_id"]], column[found["category_id"]]) for found in content["annotations"]]
    folders = [place / folder.format(split=split, year=year) for folder in IMAGE_FOLDERS]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    found = MultiLabelImages(
        source=FileImages(folder, [image["file_name"] for image in images]),
        targets=targets_from_pairs(len(images), len(categories), pairs),
        classes=tuple(category["name"] for category in categories),
    )
    check_positives(found, str(path))
    return found
