"""`crisp eval knn`: weighted k-NN on ImageNet, from all of its training images or from SimCLR's 1 % and 10 %."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crisp.distributed import World, sum_over_ranks
from crisp.errors import CrispError
from crisp.evals.classification.data import LabelledImages, data_set_name, listed, open_splits
from crisp.evals.classification.gather import agreed, share_of
from crisp.evals.classification.protocol import CROP_PX, KNN_K, KNN_TEMPERATURE, KNN_TOKENS, RESIZE_PX
from crisp.evals.config import EvalConfig
from crisp.evals.features import FrozenFeatures, Tokens, has_cls
from crisp.evals.images import CentreCrop
from crisp.evals.knn import knn_hits
from crisp.evals.results import ModelFacts, Result, Score, print_result, write_result
from crisp.evals.running import evaluation_world
from crisp.evals.store import FeatureStore
from crisp.models.frozen import FrozenModel

log = logging.getLogger(__name__)

TASK = "knn"


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnConfig(EvalConfig):
    """Classify validation images by their nearest training images (DINO's and iBOT's protocol)."""

    list_1pct: Path | None = None
    """SimCLR's 1percent.txt: also score with these training images alone."""
    list_10pct: Path | None = None
    """SimCLR's 10percent.txt, likewise."""
    full: bool = True
    """Score with all training images. Without, only what the lists name is extracted."""
    k: tuple[int, ...] = KNN_K
    """Numbers of neighbours."""
    tokens: Tokens | None = None
    """What an image's feature is; default: the last block's [CLS], or the mean patch of a model that has none."""

    def __post_init__(self) -> None:
        EvalConfig.__post_init__(self)
        if not self.k or min(self.k) < 1 or len(set(self.k)) != len(self.k):
            raise CrispError(f"k={self.k}: must be different numbers from 1 on")
        if not (self.full or self.list_1pct or self.list_10pct):
            raise CrispError("--no-full: nothing to score; give --list-1pct or --list-10pct")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bank:
    """Training images that vote."""

    suffix: str
    """Of the data set's name: '', '-1pct', '-10pct'"""
    numbers: NDArray[np.int64]
    """[n] among the training images, increasing"""


def evaluate_knn(config: KnnConfig, model: FrozenModel, world: World) -> list[Result]:
    """Score a model with each bank. Collective.

    Args:
        config: which data, and how.
        model: the frozen model.
        world: this rank's.

    Returns:
        One result for each bank, the smallest first; equal on all ranks. Its first score is that of the k which is best
        on validation, as DINO and iBOT report it.

    Raises:
        CrispError: data that is not as it should be (before anything is extracted), or a damaged image.
    """
    train, val = agreed(lambda: open_splits(config.data))
    banks = agreed(lambda: _banks(config, train))
    for bank in banks:
        if max(config.k) > len(bank.numbers):
            raise CrispError(
                f"k={config.k}: there are {len(bank.numbers)} training images{bank.suffix}; give smaller k"
            )
    features = FrozenFeatures(
        model, config.tokens or (KNN_TOKENS if has_cls(model) else "mean"),
        side_px=CROP_PX, device=world.device, precision=config.precision,
    )  # fmt: skip
    store = FeatureStore(config.cache)
    name = data_set_name(train)

    def stored(images: LabelledImages, split: str, numbers: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        return features.stored(
            store, images.source, CentreCrop(RESIZE_PX, CROP_PX), batch=config.batch, threads=config.threads,
            world=world, title=f"{name} {split}, {model.name}", numbers=numbers,
        )  # fmt: skip

    val_features = stored(val, "val")
    everything = stored(train, "train") if config.full else None
    results = []
    for bank in banks:
        if everything is None:
            voters = stored(train, f"train{bank.suffix}", bank.numbers)
        else:
            voters = everything if len(bank.numbers) == len(train) else everything[bank.numbers]
        if world.is_main:
            log.info("%s%s: %d images vote on %d", name, bank.suffix, len(bank.numbers), len(val))
        accuracy = _accuracy(config, voters, train.labels[bank.numbers], val_features, val, world)
        results.append(_result(config, f"{name}{bank.suffix}", model, features.tokens, train, val, bank, accuracy))
    return results


def _banks(config: KnnConfig, train: LabelledImages) -> list[Bank]:
    lists = (("-1pct", config.list_1pct), ("-10pct", config.list_10pct))
    banks = [Bank(suffix=suffix, numbers=listed(train, path)) for suffix, path in lists if path is not None]
    return [*banks, Bank(suffix="", numbers=np.arange(len(train)))] if config.full else banks


def _accuracy(
    config: KnnConfig,
    voters: NDArray[np.float32],
    voters_labels: NDArray[np.int64],
    val_features: NDArray[np.float32],
    val: LabelledImages,
    world: World,
) -> Mapping[int, float]:
    """By k; each rank classifies a share of the validation images."""
    mine = share_of(len(val), world)
    hits = knn_hits(
        voters, torch.from_numpy(voters_labels), val_features[mine], torch.from_numpy(val.labels[mine]),
        k=config.k, classes=len(val.classes), temperature=KNN_TEMPERATURE, device=world.device,
    )  # fmt: skip
    right = sum_over_ranks(torch.tensor([hits[k] for k in config.k], device=world.device))
    return dict(zip(config.k, (right.double() / len(val)).tolist(), strict=True))


def _result(
    config: KnnConfig,
    dataset: str,
    model: FrozenModel,
    tokens: Tokens,
    train: LabelledImages,
    val: LabelledImages,
    bank: Bank,
    accuracy: Mapping[int, float],
) -> Result:
    best = max(accuracy, key=lambda k: (accuracy[k], -k))
    in_order = [best, *(k for k in config.k if k != best)]
    settings: dict[str, Any] = {
        "tokens": tokens,
        "resize_px": RESIZE_PX,
        "crop_px": CROP_PX,
        "temperature": KNN_TEMPERATURE,
        "precision": config.precision,
        "train_images": len(bank.numbers),
        "val_images": len(val),
        "classes": len(val.classes),
        "train_fingerprint": train.source.fingerprint,
        "val_fingerprint": val.source.fingerprint,
    }
    if bank.suffix:
        settings["list_fingerprint"] = hashlib.sha256(bank.numbers.astype("<i8").tobytes()).hexdigest()
    return Result(
        task=TASK,
        dataset=dataset,
        model=ModelFacts.of(model),
        scores=[Score(metric="top1", value=100 * accuracy[k], settings={"k": k}) for k in in_order],
        settings=settings,
        chosen={"k": best, "by": "accuracy on the validation images themselves, as DINO and iBOT do"},
    )


def main(args: Sequence[str]) -> None:
    """The command."""
    import tyro

    config = tyro.cli(KnnConfig, args=args, prog="crisp eval knn", description=__doc__)
    from crisp.models.published import load_frozen

    with evaluation_world(config) as world:
        model = load_frozen(config.weights, device=world.device)
        results = evaluate_knn(config, model, world)
        if world.is_main:
            for result in results:
                print_result(result)
                log.info("%s", write_result(config.out, result))
