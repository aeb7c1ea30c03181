"""Training of linear heads on a frozen backbone: augmented images, one pass for all heads, a checkpoint per epoch."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.checkpoint import load_module_state, load_newest, save_checkpoint, set_aside_newer, step_of
from crisp.distributed import World, gather_over_ranks
from crisp.errors import CrispError
from crisp.evals.bar import bar
from crisp.evals.classification.augment import RandomCropFlip, epoch_order
from crisp.evals.classification.data import LabelledImages
from crisp.evals.classification.gather import agreed, gather_rows, share_of
from crisp.evals.classification.heads import Heads
from crisp.evals.classification.protocol import LR_BATCH
from crisp.evals.features import FrozenFeatures
from crisp.evals.images import prepared_batches

log = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints: should the newest be damaged, training goes on from the one before"""
_PART = "heads"


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What the heads' training depends on beside images and backbone."""

    rates: tuple[float, ...]
    """[H] base learning rates, for a batch of LR_BATCH"""
    epochs: int
    global_batch: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What came of it."""

    accuracy: NDArray[np.float64]
    """[epochs, H] share of validation images that a head classified right after an epoch"""
    losses: NDArray[np.float64]
    """[epochs, H] mean training cross-entropy of an epoch"""


class HeadTraining:
    """The training, from the newest of its checkpoints on. Collective.

    Each global batch is a piece of the epoch's permutation (the last one may be smaller; no image is left out or taken
    twice). Ranks make the features of a share of it each, all ranks get all features, and a rank trains its own heads
    on them (`Heads`).

    Args:
        features: of the backbone.
        train: the images to train on.
        val_features: [M, F] of the validation images, prepared without chance: the same in every epoch.
        val: the validation images.
        schedule: rates, epochs, batch, seed.
        folder: of the checkpoints; one folder per training (see `folder_for`).
        batch: images per forward pass.
        threads: decoding threads.
        world: this rank's.
    """

    def __init__(
        self,
        features: FrozenFeatures,
        train: LabelledImages,
        val_features: NDArray[np.float32],
        val: LabelledImages,
        schedule: Schedule,
        *,
        folder: Path,
        batch: int,
        threads: int,
        world: World,
    ) -> None:
        self._features, self._train, self._schedule = features, train, schedule
        self._val_features, self._val_labels = val_features, torch.from_numpy(val.labels)
        self._folder, self._batch, self._threads, self._world = folder, batch, threads, world
        numbers = range(len(schedule.rates))[world.rank :: world.size]  # in turn, so that no rank has two more
        self.heads = Heads(
            numbers,
            [schedule.rates[number] * schedule.global_batch / LR_BATCH for number in numbers],
            width=features.width,
            classes=len(train.classes),
            seed=schedule.seed,
            device=world.device,
        )

    def run(self, *, epoch_done: Callable[[int], None] = lambda done: None) -> Trained:
        """Train what is left of the epochs.

        Args:
            epoch_done: called with the number of epochs done, after each one's checkpoint.

        Raises:
            CrispError: an image that cannot be decoded, or a checkpoint that cannot be written; on all ranks.
        """
        schedule, images = self._schedule, len(self._train)
        accuracy, losses = self._restore()
        steps = -(-images // schedule.global_batch)
        left = (schedule.epochs - len(accuracy)) * steps
        with bar("linear heads", left, silent=not self._world.is_main) as advance:
            for epoch in range(len(accuracy), schedule.epochs):
                losses.append(self._train_epoch(epoch, advance))
                accuracy.append(self._validate())
                best = int(np.argmax(accuracy[-1]))
                if self._world.is_main:
                    log.info(
                        "epoch %d/%d: best head lr %g with %.2f %% on validation, training loss %.4f",
                        epoch + 1, schedule.epochs, schedule.rates[best], 100 * accuracy[-1][best], losses[-1][best],
                    )  # fmt: skip
                self._save(epoch + 1, accuracy, losses)
                epoch_done(epoch + 1)
        return Trained(accuracy=np.array(accuracy), losses=np.array(losses))

    def _train_epoch(self, epoch: int, advance: Callable[[int], None]) -> list[float]:
        """Mean loss of each head."""
        schedule, world = self._schedule, self._world
        order = epoch_order(len(self._train), seed=schedule.seed, epoch=epoch)
        pieces = [order[at : at + schedule.global_batch] for at in range(0, len(order), schedule.global_batch)]
        mine = (piece[share_of(len(piece), world)] for piece in pieces)
        prepare = RandomCropFlip(schedule.seed, epoch)
        rates = self.heads.rates_at(epoch, schedule.epochs)
        total = torch.zeros(len(self.heads), dtype=torch.float64, device=world.device)
        images = prepared_batches(self._train.source, mine, prepare, threads=self._threads)
        for piece in pieces:
            features = gather_rows(self._next(images), len(piece), world)
            labels = torch.from_numpy(self._train.labels[piece]).to(world.device, non_blocking=True)
            total += self.heads.step(features, labels, rates).double() * len(piece)
            advance(1)
        return self._of_all_heads((total / len(order)).tolist())

    def _next(self, images: Iterator[Tensor]) -> Tensor:
        """[m, F] of a rank's share of the next global batch; m may be 0. Collective."""
        prepared = agreed(lambda: next(images))
        parts = [self._features(part) for part in prepared.split(self._batch) if len(part)]
        return torch.cat(parts) if parts else torch.empty(0, self._features.width, device=self._world.device)

    def _validate(self) -> list[float]:
        """Accuracy of each head."""
        right = torch.zeros(len(self.heads), dtype=torch.int64, device=self._world.device)
        rows = self._schedule.global_batch
        for start in range(0, len(self._val_labels), rows):
            features = torch.from_numpy(np.array(self._val_features[start : start + rows])).to(self._world.device)
            right += self.heads.hits(features, self._val_labels[start : start + rows].to(self._world.device))
        return [hits / len(self._val_labels) for hits in self._of_all_heads(right.tolist())]

    def _of_all_heads(self, mine: Sequence[Any]) -> list[Any]:
        """A value of each of this rank's heads → of all heads in order. Collective."""
        by_number: dict[int, Any] = {}
        for pairs in gather_over_ranks(list(zip(self.heads.numbers, mine, strict=True))):
            by_number.update(pairs)
        return [by_number[number] for number in range(len(self._schedule.rates))]

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _restore(self) -> tuple[list[list[float]], list[list[float]]]:
        """Accuracies and losses of the epochs that are done; the heads are overwritten."""
        newest = load_newest(self._folder)
        if newest is None:
            return [], []
        if self._world.is_main:
            set_aside_newer(self._folder, step_of(newest.path))
        stored = load_module_state(newest.path, _PART)
        for name, tensor in self.heads.state().items():
            tensor.copy_(stored[name])
        accuracy, losses = newest.values["accuracy"], newest.values["losses"]
        if self._world.is_main:
            log.info("%s: going on after epoch %d of %d", newest.path, len(accuracy), self._schedule.epochs)
        return accuracy, losses

    def _save(self, done: int, accuracy: list[list[float]], losses: list[list[float]]) -> None:
        save_checkpoint(
            self._folder,
            {_PART: {name: tensor.to("cpu", copy=True) for name, tensor in self.heads.state().items()}},
            {"accuracy": accuracy, "losses": losses},
            step=done,
            doomed=lambda steps: sorted(steps)[:-KEPT],
        )


def folder_for(
    cache: Path, features: FrozenFeatures, train: LabelledImages, val: LabelledImages, schedule: Schedule
) -> Path:
    """Where the checkpoints of a training lie: named by all that its result depends on."""
    key = {
        "weights": features.model.fingerprint,
        "tokens": features.tokens,
        "precision": features.precision,
        "train": train.source.fingerprint,
        "val": val.source.fingerprint,
        **asdict(schedule),
    }
    return cache / f"linear-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}"


def check_schedule(schedule: Schedule, images: int) -> None:
    """Refuse what cannot be trained.

    Raises:
        CrispError: no epochs, no batch, or a batch larger than the data set.
    """
    for name in ("epochs", "global_batch"):
        if getattr(schedule, name) < 1:
            raise CrispError(f"{name}={getattr(schedule, name)}: must be at least 1")
    if schedule.global_batch > images:
        raise CrispError(
            f"global_batch={schedule.global_batch}: the {images} training images are fewer; give a smaller "
            f"--global-batch (the learning rate follows it)"
        )
