"""Visual Genome as the official archives unpack: objects.json, and the images in VG_100K and VG_100K_2."""

import collections
from pathlib import Path
from typing import Any

import numpy as np

from crisp.errors import CrispError
from crisp.evals.images import FileImages
from crisp.evals.multilabel.data import (
    MultiLabelImages,
    MultiLabelSet,
    check_positives,
    read_annotations,
    targets_from_pairs,
)
from crisp.evals.multilabel.protocol import VG_CLASSES, VG_SPLIT_SEED, VG_VAL_IMAGES

USUAL_PLACES = ("", "visual_genome", "VisualGenome", "visualgenome", "visual-genome", "vg", "VG")
IMAGE_FOLDERS = ("VG_100K", "VG_100K_2")
OBJECTS_FILE = "objects.json"


def find_visual_genome(root: Path) -> Path | None:
    """The folder of Visual Genome at or below `root`, for `open_visual_genome`; None if there is none."""
    for usual in USUAL_PLACES:
        place = root / usual
        if (place / OBJECTS_FILE).is_file() and (place / IMAGE_FOLDERS[0]).is_dir():
            return place
    return None


def open_visual_genome(place: Path, *, classes: int = VG_CLASSES) -> MultiLabelSet:
    """Images by the most frequent object names.

    Names are compared in lower case without surrounding blanks; their frequency is the number of objects in all of
    objects.json, equal ones in alphabetical order. There is no official split: of the images in order of their ids, a
    permutation by `numpy.random.default_rng(VG_SPLIT_SEED)` gives its first VG_VAL_IMAGES to validation (of a smaller
    data set a tenth), the others to training. Images without any of the names stay in, as negatives.

    Args:
        place: the folder.
        classes: number of names.

    Raises:
        CrispError: missing objects or images, fewer names than wanted, a class without example in a split.
    """
    path = place / OBJECTS_FILE
    content = read_annotations(path)
    try:
        names_of = {int(image["image_id"]): _names(image["objects"]) for image in content}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CrispError(f"{path}: not Visual Genome's objects ({error!r}); download them again") from error
    if len(names_of) != len(content):
        raise CrispError(f"{path}: {len(content) - len(names_of)} image ids stand there more than once")
    counts = collections.Counter(name for names in names_of.values() for name in names)
    if len(counts) < classes:
        raise CrispError(f"{path}: {len(counts)} object names, {classes} are wanted; download the objects again")
    frequent = sorted(counts, key=lambda name: (-counts[name], name))[:classes]
    files = _files(place)
    ids = np.array(sorted(names_of))
    if missing := [image for image in ids.tolist() if image not in files]:
        raise CrispError(
            f"{place}: no image {missing[0]}.jpg in {' or '.join(IMAGE_FOLDERS)}, and so {len(missing)} of {len(ids)} "
            f"images; unpack images.zip and images2.zip"
        )
    order = np.random.default_rng(VG_SPLIT_SEED).permutation(len(ids))
    val = min(VG_VAL_IMAGES, len(ids) // 10)
    column = {name: number for number, name in enumerate(frequent)}

    def split(rows: np.ndarray[Any, np.dtype[np.int64]], what: str) -> MultiLabelImages:
        chosen = ids[np.sort(rows)].tolist()
        pairs = [(row, column[name]) for row, image in enumerate(chosen) for name in names_of[image] if name in column]
        images = MultiLabelImages(
            source=FileImages(place, [files[image] for image in chosen]),
            targets=targets_from_pairs(len(chosen), classes, pairs),
            classes=tuple(frequent),
        )
        check_positives(images, f"{path} {what}")
        return images

    if not val:
        raise CrispError(f"{path}: {len(ids)} images are too few to split; download the objects again")
    return MultiLabelSet(name="vg", train=split(order[val:], "train"), val=split(order[:val], "val"))


def _names(objects: list[Any]) -> list[str]:
    """One entry for each object and name of it."""
    return [name for found in objects for name in {text.lower().strip() for text in found["names"]} if name]


def _files(place: Path) -> dict[int, str]:
    """Path below `place` of each image."""
    return {
        int(path.stem): f"{folder}/{path.name}"
        for folder in IMAGE_FOLDERS
        if (place / folder).is_dir()
        for path in (place / folder).iterdir()
        if path.suffix == ".jpg" and path.stem.isdecimal()
    }
