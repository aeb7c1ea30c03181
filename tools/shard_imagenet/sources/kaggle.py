"""ImageNet as Kaggle's competition has it: class folders for train, a flat folder and a CSV of labels for val.

LOC_synset_mapping.txt      'n01440764 tench, Tinca tinca': all classes
LOC_val_solution.csv        'ImageId,PredictionString': the labels of val
ILSVRC/Data/CLS-LOC/        train/<WordNet id>/*.JPEG, val/*.JPEG, test/*.JPEG
"""

import dataclasses
import logging
from pathlib import Path

from crisp.errors import CrispError
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.listing import Listing
from crisp.shard_imagenet.sources.folders import list_roots
from crisp.shard_imagenet.sources.labels_csv import CsvLabels
from crisp.shard_imagenet.sources.wanted import read_text, wanted_splits
from crisp.storage import Location

log = logging.getLogger(__name__)

_IMAGES = "ILSVRC/Data/CLS-LOC"
_CLASSES = "LOC_synset_mapping.txt"
_VAL_LABELS = "LOC_val_solution.csv"


def recognise(source: Location) -> bool:
    """The folder that holds ILSVRC/Data/CLS-LOC."""
    return source.is_folder() and (source / _IMAGES).is_folder()


def list_splits(source: Location, cfg: ShardConfig, folder: Path) -> list[Listing]:
    """List train and val; labels of val from `cfg.labels` or the CSV in the source, classes from the file in it.

    Raises:
        CrispError: not this layout, no labels for val, a class that the source's list of classes lacks.
        OSError: a folder cannot be listed.
    """
    images = source / _IMAGES
    if not images.is_folder():
        raise CrispError(f"{source}: no {_IMAGES} in it; give the folder that Kaggle's archive unpacks to")
    there = [child.name for child in images.children() if child.is_folder]
    if left_out := sorted(set(there) - {"train", "val"}):
        log.info("%s: left out %s, which has no labels for training", images, ", ".join(left_out))
    roots = {split: images / split for split in wanted_splits(cfg, there)}
    labels = None
    if "val" in roots and not any(child.is_folder for child in roots["val"].children()):
        where = cfg.labels or str(source / _VAL_LABELS)
        if cfg.labels is None and not Location.of(where).size():
            raise CrispError(f"{where}: not there, but it has the labels of val; give --labels, or take --split train")
        labels = CsvLabels(where)
    known = _known_classes(source)
    listings = list_roots(roots, cfg, folder, layout=_IMAGES, labels=labels, known=known)
    if known and cfg.classes is None and (strange := sorted(set(listings[0].classes) - set(known))):
        raise CrispError(f"{source / _CLASSES}: lacks {', '.join(strange[:3])}, which {images} holds; add it there")
    return [dataclasses.replace(listing, layout="Kaggle's ImageNet") for listing in listings]


def _known_classes(source: Location) -> list[str]:
    """WordNet ids of all classes; empty if the source has no list of them."""
    where = source / _CLASSES
    if not where.size():
        return []
    return [line.split()[0] for line in read_text(str(where), "--classes").splitlines() if line.strip()]
