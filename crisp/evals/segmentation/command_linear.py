"""`crisp eval seg-linear`: semantic segmentation by logistic regression on the labels of patches."""

import logging
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from crisp.distributed import World
from crisp.evals.results import ModelFacts, Result, Score, print_result, write_result
from crisp.evals.running import evaluation_world
from crisp.evals.segmentation import protocol
from crisp.evals.segmentation.bank import fits
from crisp.evals.segmentation.config import SegLinearConfig
from crisp.evals.segmentation.logistic import LogisticModel, fit_logistic
from crisp.evals.segmentation.miou import LABELS, mean_iou
from crisp.evals.segmentation.prepared import Prepared, SplitArrays, prepare
from crisp.evals.segmentation.scoring import count_predictions
from crisp.models.frozen import FrozenModel
from crisp.models.published import load_frozen

log = logging.getLogger(__name__)

TASK = "seg-linear"


def main(args: Sequence[str]) -> None:
    """Parse, evaluate, print, and write OUT/seg-linear-DATASET.json and .md."""
    config = tyro.cli(SegLinearConfig, args=args, prog="crisp eval seg-linear")
    with evaluation_world(config) as world:
        model = load_frozen(config.weights, device=world.device)
        result = evaluate_linear(config, model, world)
        if world.is_main:
            print_result(result)
            log.info("%s", write_result(config.out, result))


def evaluate_linear(config: SegLinearConfig, model: FrozenModel, world: World) -> Result:
    """mIoU on the validation split, with C chosen on a held-out tenth of train. Collective.

    Args:
        config: its `weights`, `out` and `device` are not looked at.
        model: on the device of `world`.
        world: this rank's.

    Returns:
        The score on the validation split, and those on the held-out tenth after it.

    Raises:
        CrispError: whatever of data and config does not fit together, found before features are extracted.
    """
    prepared = prepare(config, model, world, search=len(config.cs) > 1)
    held_out: Mapping[float, float] = {}
    best = config.cs[0]
    if len(config.cs) > 1:
        fitted = _fit(config.cs, prepared, prepared.fit, config, world)
        held_out = _score(fitted, prepared, prepared.train, prepared.held_out, world)
        best = max(config.cs, key=held_out.__getitem__)  # the first of equals
    fitted = _fit([best], prepared, prepared.train.images, config, world)
    score = _score(fitted, prepared, prepared.val, prepared.val.images, world)[best]
    return Result(
        task=TASK,
        dataset=prepared.data.slug,
        model=ModelFacts.of(model),
        scores=[
            Score(metric="mIoU", value=100 * score, settings={"C": best, "on": prepared.data.val.name}),
            *(
                Score(metric="mIoU", value=100 * value, settings={"C": c, "on": "held-out tenth of train"})
                for c, value in held_out.items()
            ),
        ],
        settings={
            **prepared.settings,
            "cs": list(config.cs),
            "max_iter": config.max_iter,
            "tol": protocol.TOL,
            "history": protocol.HISTORY,
            "line_search": protocol.LINE_SEARCH,
        },
        chosen={"C": best} if len(config.cs) > 1 else {},
    )


def _fit(
    cs: Sequence[float], prepared: Prepared, images: NDArray[np.int64], config: SegLinearConfig, world: World
) -> dict[float, LogisticModel]:
    """A model for each C on the patches of some images of train, each begun anew. Collective: ranks share the images.

    Its classes are all 256 labels; those that no patch has are never predicted.
    """
    bank = prepared.bank(np.array_split(images, world.size)[world.rank])
    features: Tensor | NDArray[np.float32]
    if fits(bank.features, world.device):
        features = bank.features.whole(torch.float32, world.device)
    else:
        log.info("%d features do not fit in memory: read from disk for each step, which is slow", len(bank))
        features = cast(NDArray[np.float32], bank.features)
    targets = bank.modes.to(world.device, torch.int64)
    return {
        c: fit_logistic(
            features,
            targets,
            classes=LABELS,
            c=c,
            max_iter=config.max_iter,
            tol=protocol.TOL,
            history=protocol.HISTORY,
            line_search=protocol.LINE_SEARCH,
            device=world.device,
        )
        for c in cs
    }


def _score(
    fitted: Mapping[float, LogisticModel],
    prepared: Prepared,
    split: SplitArrays,
    images: NDArray[np.int64],
    world: World,
) -> dict[float, float]:
    """mIoU in [0, 1] of each C on some images. Collective."""

    def predict(queries: Tensor) -> dict[float, Tensor]:
        return {c: model.predict(queries).to(torch.uint8)[:, None] for c, model in fitted.items()}

    counts = count_predictions(predict, list(fitted), split, images, prepared.standardiser, world)
    scores = {c: mean_iou(counts[c], prepared.data.labels.ignored) for c in fitted}
    if world.is_main:
        for c, score in scores.items():
            log.info("C=%.3g: mIoU %.2f %% on %d images", c, 100 * score, len(images))
    return scores
