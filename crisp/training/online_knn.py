"""k-NN accuracy of the teacher while the run goes on, so that progress shows in a number that means something.

The protocol is ImageNet's (`crisp.evals.knn`) on bounded, seeded subsets. Nothing of the run is changed: no draw is
made from torch's generators, and the networks are only read. Ranks share the images; each calls the teacher equally
often, so that it may be sharded over them.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.config import TrainConfig
from crisp.distributed import World, sum_over_ranks
from crisp.errors import CrispError
from crisp.evals.features import extract_features
from crisp.evals.knn import knn_accuracy
from crisp.metrics import drop_later_lines, read_metrics
from crisp.pipelines.loader import open_shard_set, renderer_threads
from crisp.pipelines.shards import ShardSet
from crisp.runs import KNN_FILE
from crisp.training.state import TrainState
from crisp.training.step import AUTOCAST

log = logging.getLogger(__name__)

HELD_OUT = 10
"""Without a validation set, one in this many images of the neighbours' shards is classified and is no neighbour"""
RESIZE_SHARE = 256 / 224
"""Shorter side of the resized image over the side of the crop, as in the protocol"""


class Subset:
    """Some images of a folder of shards."""

    def __init__(self, shards: ShardSet, sample_ids: NDArray[np.int64]) -> None:
        self.shards, self.sample_ids = shards, np.sort(sample_ids)  # in the order in which they are stored
        self.labels = torch.from_numpy(shards.index["label"][self.sample_ids].astype(np.int64))

    def __len__(self) -> int:
        return len(self.sample_ids)


class OnlineKnn:
    """The subsets, opened and checked before the run begins, and the scores so far.

    Args:
        config: of the run, with `knn.every_epochs` set.
        world: this rank's.

    Raises:
        CrispError: shards that cannot be read, images without labels, other classes in the two, too few images.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        knn = config.knn
        self._config, self._world = config, world
        self.scores: dict[int, float] = {}
        """Accuracy in [0, 1] by step"""
        train = _open(config, knn.train_shards or config.data.shards, "train_shards")
        train_ids = np.random.default_rng(config.seed).permutation(len(train))
        if knn.val_shards is None:
            held_out = len(train) // HELD_OUT
            val, val_ids, train_ids = train, train_ids[:held_out], train_ids[held_out:]
        else:
            val = _open(config, knn.val_shards, "val_shards")
            val_ids = np.random.default_rng(config.seed).permutation(len(val))
            if val.manifest.classes != train.manifest.classes:
                raise CrispError(
                    f"knn.val_shards={knn.val_shards}: {len(val.manifest.classes)} classes that are not the "
                    f"{len(train.manifest.classes)} of {train.folder}; give two splits of one data set"
                )
        self._classes = len(train.manifest.classes)
        self._train, self._val = Subset(train, train_ids[: knn.max_train]), Subset(val, val_ids[: knn.max_val])
        if not len(self._val) or knn.k > len(self._train):
            raise CrispError(
                f"knn.k={knn.k}: {len(self._train)} neighbours and {len(self._val)} images to classify are too few; "
                f"give --knn.val-shards or larger --knn.train-shards, or lower --knn.k"
            )
        if world.is_main:
            source = f"a held-out share of {train.folder}" if knn.val_shards is None else str(val.folder)
            log.info(
                "k-NN every %d epoch(s): %d images of %s against %d of %s, k=%d",
                knn.every_epochs, len(self._val), source, len(self._train), train.folder, knn.k,
            )  # fmt: skip

    def due(self, done: int, *, steps_per_epoch: int, steps: int) -> bool:
        """Whether to measure after this many steps."""
        return done > 0 and (done == steps or done % (self._config.knn.every_epochs * steps_per_epoch) == 0)

    def restore(self, run: Path, step: int) -> None:
        """Take up the scores of a resumed run up to its step. Called by every rank, before any measures."""
        path = run / KNN_FILE
        if path.exists():
            self.scores = {line["step"]: line["top1"] for line in read_metrics(path) if line["step"] <= step}
            if self._world.is_main:
                drop_later_lines(path, step)

    def measure(
        self, state: TrainState, run: Path, *, step: int, epoch: int, still_going: Callable[[], None]
    ) -> dict[str, Any]:
        """Classify, and append the result to RUN/knn.jsonl. Collective.

        Args:
            state: of the run.
            run: its folder.
            step: steps done.
            epoch: of the last of them.
            still_going: called after each batch.

        Returns:
            step and `knn_top1`.
        """
        began_s = time.perf_counter()
        train, val = (self._features(state, subset, still_going) for subset in (self._train, self._val))
        k = self._config.knn.k
        # On every rank, since it takes seconds: so all know the score.
        top1 = knn_accuracy(train, self._train.labels, val, self._val.labels, k=(k,), classes=self._classes)[k]
        self.scores[step] = top1
        if self._world.is_main:
            elapsed_s = time.perf_counter() - began_s
            log.info("step %d: k-NN accuracy %.2f %% (k=%d, %.0f s)", step, 100 * top1, k, elapsed_s)
            line = {"step": step, "epoch": epoch, "top1": top1, "k": k, "elapsed_s": elapsed_s}
            with (run / KNN_FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")
        return {"step": step, "knn_top1": top1}

    def _features(self, state: TrainState, subset: Subset, still_going: Callable[[], None]) -> Tensor:
        """[N, D] float32 of the teacher's [CLS], on every rank."""
        world, side = self._world, self._config.views.global_px
        # Padded to the same number on each rank, so that all make the same calls.
        each = -(-len(subset) // world.size)
        positions = np.arange(world.rank * each, (world.rank + 1) * each)
        precision = self._config.precision

        def teacher_cls(images: Tensor) -> Tensor:
            with torch.autocast(world.device.type, AUTOCAST[precision], enabled=precision != "fp32"):
                features = state.networks.teacher.features(images)
            still_going()
            return features

        mine, _ = extract_features(
            teacher_cls,
            subset.shards,
            sample_ids=subset.sample_ids[positions % len(subset)],
            resize_px=round(side * RESIZE_SHARE),
            crop_px=side,
            threads=renderer_threads(self._config.data.threads, max(1, world.size // world.nodes)),
            device=world.device,
        )
        features = torch.zeros(world.size * each, mine.shape[1], device=world.device)
        features[positions] = mine.to(world.device)
        return sum_over_ranks(features)[: len(subset)].cpu()


def _open(config: TrainConfig, shards: str | None, field: str) -> ShardSet:
    """Labelled shards, with sizes checked: better now than after hours."""
    opened = open_shard_set(replace(config, data=replace(config.data, shards=shards)))
    labels = np.asarray(opened.index["label"])
    if len(labels) == 0 or (labels < 0).any():
        raise CrispError(
            f"knn.{field}: {int((labels < 0).sum())} of the {len(labels)} images of {shards} have no label; give "
            f"shards of a source with one folder per class, or leave k-NN off (--knn.every-epochs 0)"
        )
    if damaged := opened.damaged_sizes():
        raise CrispError(f"knn.{field}: {damaged[0][1]}")
    return opened
