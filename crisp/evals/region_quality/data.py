"""Images and index masks, from a folder or as a segmentation data set's validation split."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from crisp.errors import CrispError
from crisp.evals.region_quality.config import RegionQualityConfig
from crisp.evals.segmentation.config import SegmentationConfig
from crisp.evals.segmentation.data import Labels, Pair, SegmentationData, Split, fingerprinted
from crisp.evals.segmentation.folder import IMAGE_ENDINGS
from crisp.evals.segmentation.layouts import FINDERS, open_data

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedImages:
    """What regions are held against."""

    slug: str
    """For the names of files"""
    data: SegmentationData
    """Its `labels`; and for messages"""
    split: Split
    """The images, in order of their names"""


def open_masked(config: RegionQualityConfig) -> MaskedImages:
    """The images that the config names, every file looked for.

    Raises:
        CrispError: no such folder, no image, an image without a mask.
    """
    if not config.data.is_dir():
        raise CrispError(f"{config.data}: there is no such folder; give the one that holds images and masks")
    found = [name for name, find in FINDERS.items() if config.dataset == "auto" and find(config.data)]
    if len(found) > 1:
        raise CrispError(f"{config.data}: holds {' and '.join(found)}; name one with --dataset")
    dataset = config.dataset if config.dataset != "auto" else found[0] if found else "folder"
    if dataset == "folder":
        data = _open_folder(config)
    else:
        # Of VOC, train is the list that needs nothing beside VOC itself; only val is looked at.
        data = open_data(
            SegmentationConfig(weights=config.weights, data=config.data, dataset=dataset, train_set="train")
        )
    split = data.val
    if config.max_images is not None and config.max_images < len(split):
        kept = np.sort(np.random.default_rng(config.seed).permutation(len(split))[: config.max_images])
        split = fingerprinted(replace(split, pairs=tuple(split.pairs[i] for i in kept), official=None), data.name)
    log.info("%s: as %s, %d images", config.data, dataset, len(split))
    return MaskedImages(slug=data.slug, data=data, split=split)


def _open_folder(config: RegionQualityConfig) -> SegmentationData:
    images, masks = config.data / config.images, config.data / config.masks
    for folder, option in ((images, "images"), (masks, "masks")):
        if not folder.is_dir():
            raise CrispError(f"{folder}: there is no such folder; say with --{option} where they lie in {config.data}")
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and _shown(path, images))
    if not paths:
        raise CrispError(f"{images}: holds no image ({', '.join(IMAGE_ENDINGS)}); name another folder with --images")
    names = [path.relative_to(images).with_suffix("").as_posix() for path in paths]
    if len(set(names)) < len(names):
        raise CrispError(f"{images}: two images differ in their ending alone, and would share one mask")
    name = config.data.resolve().name
    pairs = tuple(Pair(name=n, image=p, mask=masks / f"{n}.png") for n, p in zip(names, paths, strict=True))
    split = fingerprinted(Split(name=config.images, pairs=pairs), name)
    return SegmentationData(
        name=name, slug=name.lower(), root=config.data, train=split, val=split, labels=Labels(ignored=config.ignored)
    )


def _shown(path: Path, root: Path) -> bool:
    """Not a hidden file, and in no hidden folder."""
    return not any(part.startswith(".") for part in path.relative_to(root).parts)
