"""Labelled images: class folders as ImageNet is unpacked, or shards that `crisp shard` wrote; and lists of a part."""

import collections
import json
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.evals.images import FileImages, ImageSource, ShardImages
from crisp.pipelines.shards import ShardSet
from crisp.shard_format import MANIFEST_FILE

IMAGENET_CLASSES = 1000
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
SPLITS = ("train", "val")
USUAL_PLACES = ("", "imagenet", "ImageNet", "imagenet-1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC", "imagenet/shards")
"""Where ImageNet lies below a folder of data sets"""

_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImages:
    """A split: N images, and the class of each."""

    source: ImageSource
    labels: NDArray[np.int64]
    """[N] in [0, C)"""
    classes: tuple[str, ...]
    """Names of the C classes"""
    place: Path

    def __len__(self) -> int:
        return len(self.labels)


def open_splits(root: Path) -> tuple[LabelledImages, LabelledImages]:
    """Train and val of a data set, each a folder of class folders, or of shards.

    Raises:
        CrispError: a split that is missing, no class folders, a class without images, classes that differ between the
            two, unlabelled or incomplete shards.
    """
    for split in SPLITS:
        if not (root / split).is_dir():
            raise CrispError(
                f"{root / split}: no such folder; give the folder that holds train and val, each of class "
                f"folders or of shards"
            )
    train, val = (open_split(root / split) for split in SPLITS)
    if train.classes != val.classes:
        strange = sorted(set(train.classes) ^ set(val.classes))
        raise CrispError(
            f"{root}: {len(train.classes)} classes in train and {len(val.classes)} in val, {strange[0]!r} is not in "
            f"both; give two splits of one data set"
        )
    return train, val


def open_split(place: Path) -> LabelledImages:
    """The images of one split, checked as far as names, sizes and labels go; nothing is decoded."""
    return _open_shards(place) if (place / MANIFEST_FILE).is_file() else _open_folders(place)


def find_imagenet(root: Path) -> Path | None:
    """The folder below `root` that holds ImageNet as class folders or shards, for `open_splits`; None if there is none.

    Only classes named by WordNet ids count: other data sets have train and val, too.
    """
    for usual in USUAL_PLACES:
        place = root / usual
        if all(_names_wordnet_ids(place / split) for split in SPLITS):
            return place
    return None


def _names_wordnet_ids(split: Path) -> bool:
    if (split / MANIFEST_FILE).is_file():
        classes = json.loads((split / MANIFEST_FILE).read_bytes()).get("classes", [])
        return bool(classes) and all(_WORDNET_ID.fullmatch(name) for name in classes)
    return split.is_dir() and any(_WORDNET_ID.fullmatch(path.name) for path in list(split.iterdir()) if path.is_dir())


def _open_folders(place: Path) -> LabelledImages:
    classes = sorted(entry.name for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        flat = sum(Path(entry.name).suffix.lower() in EXTENSIONS for entry in os.scandir(place))
        raise CrispError(
            f"{place}: no class folders, but {flat} images; sort them into one folder per class (ImageNet's validation "
            f"images come flat), or give shards that 'crisp shard' wrote with --labels"
        )
    with ThreadPoolExecutor(16) as pool:
        names = list(pool.map(lambda name: _images_in(place / name), classes))
    if empty := [name for name, images in zip(classes, names, strict=True) if not images]:
        raise CrispError(
            f"{place / empty[0]}: no images, and so {len(empty)} of {len(classes)} classes; unpack them, or remove the "
            f"empty folders from every split"
        )
    paths = [f"{name}/{image}" for name, images in zip(classes, names, strict=True) for image in images]
    labels = np.repeat(np.arange(len(classes)), [len(images) for images in names])
    return LabelledImages(source=FileImages(place, paths), labels=labels, classes=tuple(classes), place=place)


def _images_in(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if Path(entry.name).suffix.lower() in EXTENSIONS and not entry.name.startswith(".")
    )


def _open_shards(place: Path) -> LabelledImages:
    shards = ShardSet(place)
    labels = np.asarray(shards.index["label"]).astype(np.int64)
    if not len(labels) or (labels < 0).any():
        raise CrispError(
            f"{place}: {int((labels < 0).sum())} of {len(labels)} images have no label; shard a source with one folder "
            f"per class, or give 'crisp shard' --labels"
        )
    if damaged := shards.damaged_sizes():
        raise CrispError(damaged[0][1])
    classes = shards.manifest.classes
    if empty := np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0).tolist():
        raise CrispError(f"{place}: no images of class {classes[empty[0]]!r}, and so {len(empty)} of {len(classes)}")
    return LabelledImages(source=ShardImages(shards), labels=labels, classes=classes, place=place)


# --------------------------------------------------------------------------------------------- a part of the images


def listed(images: LabelledImages, list_file: Path) -> NDArray[np.int64]:
    """Numbers of the images that a file names, one name per line, as SimCLR's 1percent.txt and 10percent.txt do.

    Args:
        images: of the train split.
        list_file: names of files, without folders.

    Returns:
        [n] numbers in increasing order.

    Raises:
        CrispError: no such list, a name that is no image's or that stands there twice, a class without any image.
    """
    try:
        names = [line.strip() for line in list_file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CrispError(f"{list_file}: not a readable list of file names ({error}); give SimCLR's list") from error
    if not names:
        raise CrispError(f"{list_file}: names no images; give SimCLR's list")
    present = file_names(images)
    numbers = {name: number for number, name in enumerate(present)}
    if len(numbers) != len(present):
        name = next(name for name, times in collections.Counter(present).items() if times > 1)
        raise CrispError(f"{images.place}: {name!r} names several images, so a list of names is ambiguous")
    if unknown := [name for name in names if name not in numbers]:
        raise CrispError(
            f"{list_file}: {unknown[0]!r} is no image of {images.place}, and so {len(unknown)} of {len(names)} names; "
            f"give the list of this data set, and images under their original names"
        )
    if twice := [name for name, times in collections.Counter(names).items() if times > 1]:
        raise CrispError(f"{list_file}: {twice[0]!r} stands there more than once; mend the list")
    chosen = np.array(sorted(numbers[name] for name in names))
    counts = np.bincount(images.labels[chosen], minlength=len(images.classes))
    if empty := np.flatnonzero(counts == 0).tolist():
        raise CrispError(
            f"{list_file}: no image of class {images.classes[empty[0]]!r}, and so for {len(empty)} classes; give a "
            f"list that has each class"
        )
    return chosen


def file_names(images: LabelledImages) -> list[str]:
    """The name of each image's file in the source, without folders.

    Of shards, those that their tars note: about a minute for a million.

    Raises:
        CrispError: a tar that cannot be read.
    """
    if isinstance(images.source, FileImages):
        return [name.rpartition("/")[2] for name in images.source.names]
    assert isinstance(images.source, ShardImages)
    names = []
    shards = images.source.shards
    for info in shards.manifest.shards:
        try:
            with tarfile.open(shards.folder / info.name) as tar:
                notes = [tar.extractfile(member) for member in tar if member.name.endswith(".json")]
                sources = [json.loads(note.read())["source"] for note in notes if note is not None]
        except (OSError, tarfile.TarError, ValueError, KeyError) as error:
            raise CrispError(f"{shards.folder / info.name}: its samples' names cannot be read ({error!r})") from error
        names += [source.rpartition("/")[2] for source in sources]
    if len(names) != len(images):
        raise CrispError(
            f"{shards.folder}: the tars name {len(names)} samples, the index {len(images)}; shard it again"
        )
    return names


def data_set_name(train: LabelledImages) -> str:
    """`imagenet` for its 1000 classes; else the name of the folder that holds the splits.

    A part of the classes, in a folder called imagenet, is not taken for the whole: `imagenet-100-classes`.
    """
    if len(train.classes) == IMAGENET_CLASSES and all(_WORDNET_ID.fullmatch(name) for name in train.classes):
        return "imagenet"
    name = train.place.resolve().parent.name.lower()
    return f"imagenet-{len(train.classes)}-classes" if name == "imagenet" else name
