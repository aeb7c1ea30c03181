"""`crisp eval multilabel`: a linear probe with several labels per image on VOC 2012, COCO or Visual Genome."""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.distributed import World, gather_over_ranks
from crisp.errors import CrispError
from crisp.evals.classification.gather import agreed
from crisp.evals.config import EvalConfig
from crisp.evals.features import FrozenFeatures, Tokens, has_cls
from crisp.evals.images import CentreCrop, WholeImage
from crisp.evals.multilabel import protocol
from crisp.evals.multilabel.average_precision import mean_average_precision
from crisp.evals.multilabel.coco import find_coco2014, find_coco2017, open_coco
from crisp.evals.multilabel.data import MultiLabelSet
from crisp.evals.multilabel.low_shot import low_shot
from crisp.evals.multilabel.probe import scores_of, train_probe
from crisp.evals.multilabel.visual_genome import find_visual_genome, open_visual_genome
from crisp.evals.multilabel.voc import find_voc2012_multilabel, open_voc2012
from crisp.evals.results import ModelFacts, Result, Score, print_result, write_result
from crisp.evals.running import evaluation_world
from crisp.evals.store import FeatureStore
from crisp.models.frozen import FrozenModel

log = logging.getLogger(__name__)

TASK = "multilabel"
Dataset = Literal["voc2012", "coco2014", "coco2017", "vg"]
RESULT_NAMES: Mapping[str, str] = {"coco2014": "coco"}
"""The paper's COCO is the edition of 2014"""
SCORING_ROWS = 8192
"""Validation images on the device at a time"""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultilabelConfig(EvalConfig):
    """Train a linear classifier with a sigmoid per class on [CLS ; mean patch] and score its mAP."""

    dataset: Dataset | None = None
    """What lies in the data folder; default: the first of voc2012, coco2014, coco2017 and vg that is found."""
    shots: tuple[int, ...] | None = None
    """Also train with so many images per class, over five draws; default: 1, 2 and 5 on VOC, none elsewhere."""
    epochs: int | None = None
    """Default: 500 on VOC, 200 elsewhere."""
    global_batch: int = protocol.GLOBAL_BATCH
    """Images per step; the paper's 256 per GPU on 4."""
    fit: Literal["whole", "crop"] = "whole"
    """whole: the image as a 224 px square, each axis resized on its own, so that every labelled object is on it; crop:
    shorter side to 256, middle 224."""
    tokens: Tokens | None = None
    """What an image's feature is; default: [CLS ; mean patch], or the mean patch of a model without [CLS]."""
    seed: int = 0
    """Of the probe's weights and order. The low-shot draws have seeds 0 to 4."""

    def __post_init__(self) -> None:
        EvalConfig.__post_init__(self)
        for name in ("epochs", "global_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CrispError(f"{name}={value}: must be at least 1")
        if self.shots is not None and (min(self.shots, default=1) < 1 or len(set(self.shots)) != len(self.shots)):
            raise CrispError(f"shots={self.shots}: must be different numbers from 1 on")


_FINDERS: Mapping[Dataset, Callable[[Path], Path | None]] = {
    "voc2012": find_voc2012_multilabel,
    "coco2014": find_coco2014,
    "coco2017": find_coco2017,
    "vg": find_visual_genome,
}


def open_data_set(root: Path, dataset: Dataset | None) -> MultiLabelSet:
    """The data set in a folder, with all that can be checked before an image is decoded checked.

    Raises:
        CrispError: it is not there, or incomplete.
    """
    places = {name: place for name, find in _FINDERS.items() if (place := find(root)) is not None}
    chosen = dataset or next(iter(places), None)
    if chosen is None or chosen not in places:
        raise CrispError(
            f"{root}: no {chosen or 'multi-label data set'} here; give the folder that VOCdevkit, COCO's train and "
            f"annotations folders or Visual Genome's objects.json and VG_100K were unpacked in"
        )
    log.info("multi-label data: %s in %s", chosen, places[chosen])
    openers: Mapping[Dataset, Callable[[Path], MultiLabelSet]] = {
        "voc2012": open_voc2012,
        "coco2014": lambda place: open_coco(place, 2014),
        "coco2017": lambda place: open_coco(place, 2017),
        "vg": open_visual_genome,
    }
    return openers[chosen](places[chosen])


def evaluate_multilabel(config: MultilabelConfig, model: FrozenModel, world: World) -> Result:
    """Extract features, train probes on them and score. Collective.

    The ranks share the extraction; the training takes minutes on stored features, so each rank does all of it.

    Args:
        config: which data, and how.
        model: the frozen model.
        world: this rank's.

    Returns:
        mAP (scikit-learn's step sum) and mAP-voc (PASCAL VOC's interpolated area) of the probe after its last epoch,
        and of the low-shot probes the mean and sample standard deviation over the draws.

    Raises:
        CrispError: data that is not as it should be (before anything is extracted), or a damaged image.
    """
    data = agreed(lambda: open_data_set(config.data, config.dataset))
    shots = config.shots if config.shots is not None else (protocol.SHOTS if data.name == "voc2012" else ())
    draws = {(n, seed): low_shot(data.train, n, seed) for n in shots for seed in protocol.LOW_SHOT_SEEDS}
    prepare = WholeImage(protocol.SIDE_PX) if config.fit == "whole" else CentreCrop(256, protocol.SIDE_PX)
    features = FrozenFeatures(
        model, config.tokens or (protocol.TOKENS if has_cls(model) else "mean"),
        side_px=protocol.SIDE_PX, device=world.device, precision=config.precision,
    )  # fmt: skip
    store = FeatureStore(config.cache)
    train_features, val_features = (
        features.stored(
            store, images.source, prepare, batch=config.batch, threads=config.threads, world=world,
            title=f"{data.name} {split}, {model.name}",
        )
        for split, images in (("train", data.train), ("val", data.val))
    )  # fmt: skip
    epochs = config.epochs or protocol.EPOCHS[data.name]
    train = torch.from_numpy(np.array(train_features)).to(world.device)

    def score(numbers: NDArray[np.int64] | None, seed: int) -> tuple[float, float]:
        rows = train if numbers is None else train[torch.from_numpy(numbers).to(world.device)]
        targets = data.train.targets if numbers is None else data.train.targets[numbers]
        probe = train_probe(rows, targets, epochs=epochs, global_batch=config.global_batch, seed=seed)
        return mean_average_precision(_val_scores(probe, val_features, world.device), data.val.targets)

    scores = []
    for n in shots:
        of_draws = [score(draws[n, seed], seed) for seed in protocol.LOW_SHOT_SEEDS]
        scores += [_low_shot_score(f"{metric}-{n}shot", values) for metric, values in _by_metric(of_draws)]
    full = score(None, config.seed)
    scores += [Score(metric=metric, value=100 * values[0]) for metric, values in _by_metric([full])]
    # Ranks on other hardware may round otherwise: all take the main rank's.
    scores = gather_over_ranks(scores)[0]
    return Result(
        task=TASK,
        dataset=RESULT_NAMES.get(data.name, data.name),
        model=ModelFacts.of(model),
        scores=scores,
        settings=_settings(config, data, prepare, features.tokens, epochs, shots),
    )


def _val_scores(probe: torch.nn.Linear, features: NDArray[np.float32], device: torch.device) -> NDArray[np.float32]:
    """[N, C], a part of the memory map at a time."""
    parts: list[Tensor] = [
        torch.from_numpy(np.array(features[start : start + SCORING_ROWS])).to(device)
        for start in range(0, len(features), SCORING_ROWS)
    ]
    return np.concatenate([scores_of(probe, part) for part in parts])


def _by_metric(pairs: Sequence[tuple[float, float]]) -> list[tuple[str, list[float]]]:
    return [("mAP", [steps for steps, _ in pairs]), ("mAP-voc", [area for _, area in pairs])]


def _low_shot_score(metric: str, values: Sequence[float]) -> Score:
    return Score(metric=metric, value=100 * statistics.fmean(values), std=100 * statistics.stdev(values))


def _settings(
    config: MultilabelConfig,
    data: MultiLabelSet,
    prepare: WholeImage | CentreCrop,
    tokens: Tokens,
    epochs: int,
    shots: Sequence[int],
) -> dict[str, Any]:
    return {
        "data": data.name,
        "tokens": tokens,
        "fit": config.fit,
        "prepare": asdict(prepare),
        "optimiser": "AdamW",
        "lr": protocol.LR,
        "weight_decay": protocol.WEIGHT_DECAY,
        "epochs": epochs,
        "global_batch": config.global_batch,
        "seed": config.seed,
        "shots": list(shots),
        "low_shot_seeds": list(protocol.LOW_SHOT_SEEDS) if shots else [],
        "precision": config.precision,
        "train_images": len(data.train),
        "val_images": len(data.val),
        "classes": len(data.train.classes),
        "train_fingerprint": data.train.source.fingerprint,
        "val_fingerprint": data.val.source.fingerprint,
    }


def main(args: Sequence[str]) -> None:
    """The command."""
    import tyro

    config = tyro.cli(MultilabelConfig, args=args, prog="crisp eval multilabel", description=__doc__)
    from crisp.models.published import load_frozen

    with evaluation_world(config) as world:
        model = load_frozen(config.weights, device=world.device)
        result = evaluate_multilabel(config, model, world)
        if world.is_main:
            print_result(result)
            log.info("%s", write_result(config.out, result))
