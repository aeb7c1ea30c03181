"""The true labels of a split at the evaluation's resolution, and the checks of every mask before anything long begins.

Axes: N images, n patches, p the side of a patch.
"""

import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.segmentation.data import IDS, Labels, Pair, SegmentationData, Split
from crisp.evals.segmentation.masks import read_mask
from crisp.evals.segmentation.patches import mode_labels, patch_pixels, prepare_mask
from crisp.evals.store import FeatureStore, Field

log = logging.getLogger(__name__)

_IMAGES_PER_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Truth:
    """Labels of a split, memory mapped."""

    pixels: NDArray[np.uint8]
    """[N, n, p*p], see `patch_pixels`"""
    modes: NDArray[np.uint8]
    """[N, n], see `mode_labels`"""
    held: NDArray[np.uint8]
    """[N, 256]: 1 where an image has a pixel of that label, at its own resolution"""


def load_truth(
    split: Split,
    data: SegmentationData,
    *,
    side_px: int,
    patch_px: int,
    store: FeatureStore,
    threads: int,
    world: World,
) -> Truth:
    """Read, check and prepare all masks of a split. Kept in the store, since it does not depend on the model.

    Raises:
        CrispError: a mask that cannot be read, has another size than its image, or holds an unknown id.
    """
    grid = side_px // patch_px

    def compute(items: range) -> Mapping[str, NDArray[Any]]:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda i: _read(split.pairs[i], data.labels, side_px, patch_px), items))
        faults = [fault for fault in found if isinstance(fault, CrispError)]
        if faults:
            more = f" (and {len(faults) - 1} more of {len(items)} files are faulty)" if len(faults) > 1 else ""
            raise CrispError(f"{faults[0]}{more}")
        pixels, held = zip(*(item for item in found if not isinstance(item, CrispError)), strict=True)
        modes = [mode_labels(labels) for labels in pixels]
        return {"pixels": np.stack(pixels), "modes": np.stack(modes), "held": np.stack(held)}

    arrays = store.arrays(
        {
            "what": "labels of patches",
            "data": split.fingerprint,
            "side_px": side_px,
            "patch_px": patch_px,
            "ids": hashlib.sha256(data.labels.table.tobytes() + bytes(data.labels.known)).hexdigest(),
        },
        len(split),
        {
            "pixels": Field((grid * grid, patch_px * patch_px), "uint8"),
            "modes": Field((grid * grid,), "uint8"),
            "held": Field((IDS,), "uint8"),
        },
        compute,
        chunk=_IMAGES_PER_CHUNK,
        world=world,
        title=f"{data.name} {split.name}: masks",
    )
    return Truth(arrays["pixels"], arrays["modes"], arrays["held"])


def _read(
    pair: Pair, labels: Labels, side_px: int, patch_px: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | CrispError:
    """Pixel labels [n, p*p] and held labels [256] of an image, or what is wrong with it."""
    try:
        mask = read_mask(pair.mask)
        size = _image_size(pair)
    except CrispError as error:
        return error
    if size != mask.size:
        return CrispError(
            f"{pair.mask}: {mask.size[0]}×{mask.size[1]} px, its image {pair.image.name} has {size[0]}×{size[1]}; "
            f"take both from the same archive"
        )
    ids = np.asarray(mask.histogram()[:IDS]) > 0
    unknown = sorted(set(np.flatnonzero(ids).tolist()) - set(labels.known))
    if unknown:
        return CrispError(
            f"{pair.mask}: holds the unknown label id {unknown[0]}; the layout knows {_ranges(labels.known)}: "
            f"give masks of that data set"
        )
    held = np.zeros(IDS, np.uint8)
    held[labels.table[ids]] = 1
    return patch_pixels(labels.table[prepare_mask(mask, side_px)], patch_px), held


def _image_size(pair: Pair) -> tuple[int, int]:
    """Width and height, from the header alone."""
    try:
        with Image.open(pair.image) as image:
            return image.size
    except (OSError, UnidentifiedImageError) as error:
        raise CrispError(
            f"{pair.image}: cannot be read as an image ({error}); copy it from the archive again"
        ) from error


def _ranges(ids: tuple[int, ...]) -> str:
    """`0–20, 255`."""
    steps = [i for i in sorted(ids) if i - 1 not in ids], [i for i in sorted(ids) if i + 1 not in ids]
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in zip(*steps, strict=True))


def check_classes(data: SegmentationData, train: Truth, val: Truth, *, allow_empty: bool) -> None:
    """Whether every class can be learnt, and something is scored.

    Raises:
        CrispError: a class without a pixel in train (only logged where `allow_empty`), or none but ignored labels.
    """
    labels = data.labels
    in_train, in_val = (set(np.flatnonzero(truth.held.any(axis=0)).tolist()) for truth in (train, val))
    for split, held in ((data.train, in_train), (data.val, in_val)):
        if not held - set(labels.ignored):
            raise CrispError(
                f"{data.root}: the masks of {split.name} hold ignored labels {labels.ignored} alone; check the ids "
                f"that are ignored"
            )
    wanted = set(labels.classes) if labels.classes is not None else in_val - set(labels.ignored)
    for split, held in ((data.train, in_train), (data.val, in_val)):
        if empty := sorted(wanted - held):
            text = (
                f"{data.root}: {len(empty)} of {len(wanted)} classes have no pixel in {split.name}, "
                f"the first is {labels.title(empty[0])}"
            )
            if split is data.train and not allow_empty:
                raise CrispError(f"{text}; unpack all of it, or give --allow-empty-classes to score it as it is")
            log.warning("%s", text)
