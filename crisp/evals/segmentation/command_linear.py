"""`crisp eval seg-linear`: semantic segmentation by logistic regression on the labels of patches."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from crisp.distributed import World
from crisp.evals.results import ModelFacts, Result, Score, print_result, write_result
from crisp.evals.running import evaluation_world, from_main, together
from crisp.evals.segmentation import protocol
from crisp.evals.segmentation.config import SegLinearConfig
from crisp.evals.segmentation.logistic import LogisticModel, fit_logistic
from crisp.evals.segmentation.miou import mean_iou
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
    """mIoU on the validation split, with C chosen on a held-out tenth of train. Collective: ranks share the values of C.

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
        mine = list(config.cs[world.rank :: world.size])
        shares = together(lambda: _learn(mine, prepared, prepared.fit, config, world))
        learnt = {c: one for share in shares for c, one in share.items()}
        held_out = _score({c: learnt[c] for c in config.cs}, prepared, prepared.train, prepared.held_out, world)
        best = max(config.cs, key=held_out.__getitem__)  # the first of equals
    # One rank alone: sums of others could differ in the last bit, and then so would the model.
    learnt = from_main(world, lambda: _learn([best], prepared, prepared.train.images, config, world))
    score = _score(learnt, prepared, prepared.val, prepared.val.images, world)[best]
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


@dataclass(frozen=True, slots=True)
class Learnt:
    """A model on the CPU, and the label of each of its classes."""

    model: LogisticModel
    labels: Tensor
    """[C] uint8"""

    def on(self, device: torch.device) -> "Learnt":
        """The same elsewhere."""
        model = replace(self.model, weight=self.model.weight.to(device), bias=self.model.bias.to(device))
        return Learnt(model, self.labels.to(device))

    def predict(self, queries: Tensor) -> Tensor:
        """[M, D] → the label [M] uint8 with the highest logit, the first of equals."""
        logits = queries @ self.model.weight.T + self.model.bias  # [M, C]
        return self.labels[logits.argmax(dim=1)]


def _learn(
    cs: list[float], prepared: Prepared, images: NDArray[np.int64], config: SegLinearConfig, world: World
) -> dict[float, Learnt]:
    """A model for each C on the patches of some images of train, each begun anew."""
    if not cs:
        return {}
    bank = prepared.bank(images)
    # As scikit-learn and CAPI do: labels that no patch has are no classes of the model.
    labels, targets = bank.modes.unique(return_inverse=True)  # sorted
    features, targets = bank.features.whole(torch.float32, world.device), targets.to(world.device)
    learnt = {}
    for c in cs:
        model = fit_logistic(
            features,
            targets,
            classes=len(labels),
            c=c,
            max_iter=config.max_iter,
            tol=protocol.TOL,
            history=protocol.HISTORY,
            line_search=protocol.LINE_SEARCH,
        )
        log.info(
            "C=%.3g: loss %.6f after %d iterations on %d patches", c, model.loss, model.iterations, len(features)
        )  # fmt: skip
        learnt[c] = Learnt(model, labels).on(torch.device("cpu"))
    return learnt


def _score(
    learnt: Mapping[float, Learnt],
    prepared: Prepared,
    split: SplitArrays,
    images: NDArray[np.int64],
    world: World,
) -> dict[float, float]:
    """mIoU in [0, 1] of each C on some images. Collective."""
    here = {c: one.on(world.device) for c, one in learnt.items()}

    def predict(queries: Tensor) -> dict[float, Tensor]:
        return {c: one.predict(queries)[:, None] for c, one in here.items()}

    counts = count_predictions(predict, list(here), split, images, prepared.standardiser, world)
    scores = {c: mean_iou(counts[c], prepared.data.labels.ignored) for c in here}
    if world.is_main:
        for c, score in scores.items():
            log.info("C=%.3g: mIoU %.2f %% on %d images", c, 100 * score, len(images))
    return scores
