"""What both classifiers start from: checked data, true labels, features, the split of train, the standardisation."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.running import from_main
from crisp.evals.segmentation import protocol
from crisp.evals.segmentation.bank import Bank, kept_rows
from crisp.evals.segmentation.config import SegmentationConfig
from crisp.evals.segmentation.data import SegmentationData
from crisp.evals.segmentation.extraction import extract_patches, pick_side
from crisp.evals.segmentation.layouts import open_data
from crisp.evals.segmentation.standardise import Standardiser, fit_standardiser
from crisp.evals.segmentation.truth import Truth, check_classes, load_truth
from crisp.evals.store import FeatureStore
from crisp.models.frozen import FrozenModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitArrays:
    """Features and labels of a split, memory mapped."""

    features: NDArray[np.float32]
    """[N, n, D], not standardised"""
    truth: Truth

    @property
    def images(self) -> NDArray[np.int64]:
        """All of it."""
        return np.arange(len(self.features))


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """All that a classifier needs."""

    data: SegmentationData
    train: SplitArrays
    val: SplitArrays
    fit: NDArray[np.int64]
    """Images of train to fit on while hyper-parameters are chosen"""
    held_out: NDArray[np.int64]
    """Images of train to choose them on"""
    standardiser: Standardiser
    """Fitted on `fit` once, and never again"""
    settings: Mapping[str, Any]
    """For the result"""

    def bank(self, images: NDArray[np.int64]) -> Bank:
        """The patches of these images of train to learn from."""
        return Bank(self.train.features, self.train.truth, images, self.standardiser, self.data.labels.ignored)


def note_for(data: SegmentationData) -> str:
    """What a reader of the scores must know: the data set's own note, and which splits are not the published ones."""
    odd = [
        f"{data.name} {split.name} has {len(split)} images, as published it has {split.official}"
        for split in (data.train, data.val)
        if split.official not in (None, len(split))
    ]
    return "; ".join([*([data.note] if data.note else []), *odd])


def prepare(
    config: SegmentationConfig,
    model: FrozenModel,
    world: World,
    *,
    search: bool,
    check: Callable[[int], None] = lambda patches: None,
) -> Prepared:
    """Check everything, then extract what is not on disk yet. Collective.

    Args:
        config: of the evaluation.
        model: its backbone on the device, in evaluation mode.
        world: this rank's.
        search: whether hyper-parameters are to be chosen on a held-out tenth.
        check: called before anything long with the number of patches to learn from, the smallest there will be.

    Raises:
        CrispError: whatever of data and config does not fit together.
    """
    data = from_main(world, lambda: open_data(config))  # one rank looks for the files
    if data.note and world.is_main:
        log.warning("%s", data.note)
    side_px = pick_side(model.backbone, config.image_px, protocol.image_px)
    fit, held_out = protocol.held_out_split(len(data.train), seed=config.seed)
    if search and not len(held_out):
        raise CrispError(
            f"{data.root}: {data.train.name} has {len(data.train)} images, too few to hold out a tenth; give at least "
            f"{protocol.HELD_OUT_DIVISOR}, or fix the hyper-parameters to one value each"
        )
    store = FeatureStore(config.cache)
    train_truth, val_truth = (
        load_truth(
            split, data, side_px=side_px, patch_px=model.backbone.patch_px, store=store, threads=config.threads,
            world=world,
        )
        for split in (data.train, data.val)
    )  # fmt: skip
    from_main(world, lambda: check_classes(data, train_truth, val_truth, allow_empty=config.allow_empty_classes))
    patches = len(kept_rows(train_truth, fit, data.labels.ignored))
    if not patches:
        raise CrispError(f"{data.root}: each patch of {data.train.name} is ignored; check the ids that are ignored")
    check(patches)
    if world.is_main:
        log.info(
            "%s: %d images of %s (%d held out), %d of %s, %d px, %d labelled patches to fit on",
            data.name, len(data.train), data.train.name, len(held_out), len(data.val), data.val.name, side_px, patches,
        )  # fmt: skip
    train, val = (
        SplitArrays(
            features=extract_patches(
                model, split, config, side_px=side_px, store=store, world=world,
                title=f"{data.name} {split.name}: {model.name}",
            ),
            truth=truth,
        )
        for split, truth in ((data.train, train_truth), (data.val, val_truth))
    )  # fmt: skip
    return Prepared(
        data=data,
        train=train,
        val=val,
        fit=fit,
        held_out=held_out,
        standardiser=fit_standardiser(train.features, fit, world),
        settings={
            "image_px": side_px,
            "seed": config.seed,
            "precision": config.precision,
            "ignored": list(data.labels.ignored),
            "train": {"split": data.train.name, "images": len(data.train), "files": data.train.fingerprint},
            "val": {"split": data.val.name, "images": len(data.val), "files": data.val.fingerprint},
            "held_out_images": len(held_out),
            **({"note": note} if (note := note_for(data)) else {}),
        },
    )
