"""`crisp eval linear`: linear probes on ImageNet, all heads of a grid of learning rates in one pass."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from crisp.distributed import World
from crisp.evals.classification import protocol
from crisp.evals.classification.data import LabelledImages, data_set_name, open_splits
from crisp.evals.classification.gather import agreed
from crisp.evals.classification.linear import HeadTraining, Schedule, Trained, check_schedule, folder_for
from crisp.evals.classification.protocol import CROP_PX, RESIZE_PX, linear_tokens
from crisp.evals.config import EvalConfig
from crisp.evals.features import FrozenFeatures, Tokens, has_cls
from crisp.evals.images import CentreCrop
from crisp.evals.results import ModelFacts, Result, Score, print_result, write_result
from crisp.evals.running import evaluation_world
from crisp.evals.store import FeatureStore
from crisp.models.frozen import FrozenModel

log = logging.getLogger(__name__)

TASK = "linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig(EvalConfig):
    """Train linear classifiers on frozen features of augmented images (iBOT's protocol, and CRISP's own setting)."""

    heads: Literal["grid", "crisp"] = "grid"
    """grid: iBOT's 45 learning rates {1..9} × 10^{−4..0}, 100 epochs; crisp: the one rate 1e-3, 200 epochs. Rates are
    multiplied by global_batch / 256."""
    epochs: int | None = None
    """Default: that of the heads."""
    global_batch: int = protocol.GLOBAL_BATCH
    """Images per step over all ranks; the result does not depend on how many ranks there are."""
    tokens: Tokens | None = None
    """What an image's feature is; default: the last 4 [CLS] up to width 384 (ViT-S), the last [CLS] and the mean patch
    above (ViT-B, L), the mean patch for a model without [CLS]."""
    seed: int = 0
    """Of the heads' weights, the order of images and their crops."""

    def __post_init__(self) -> None:
        EvalConfig.__post_init__(self)

    @property
    def schedule(self) -> Schedule:
        """What the heads are trained by."""
        grid = self.heads == "grid"
        default_epochs = protocol.GRID_EPOCHS if grid else protocol.CRISP_EPOCHS
        return Schedule(
            rates=protocol.GRID_LRS if grid else protocol.CRISP_LRS,
            epochs=default_epochs if self.epochs is None else self.epochs,
            global_batch=self.global_batch,
            seed=self.seed,
        )


def evaluate_linear(config: LinearConfig, model: FrozenModel, world: World) -> Result:
    """Train the heads and score them after each epoch. Collective; goes on from its own newest checkpoint.

    Args:
        config: which data, and how.
        model: the frozen model.
        world: this rank's.

    Returns:
        The first score is the best of all heads and epochs, chosen on the validation images as iBOT does; the second
        the best head after the last epoch.

    Raises:
        CrispError: data that is not as it should be (before anything is computed), or a damaged image.
    """
    train, val = agreed(lambda: open_splits(config.data))
    schedule = config.schedule
    check_schedule(schedule, len(train))
    features = FrozenFeatures(
        model, config.tokens or linear_tokens(model.backbone.dim, has_cls=has_cls(model)),
        side_px=CROP_PX, device=world.device, precision=config.precision,
    )  # fmt: skip
    val_features = features.stored(
        FeatureStore(config.cache), val.source, CentreCrop(RESIZE_PX, CROP_PX), batch=config.batch,
        threads=config.threads, world=world, title=f"{data_set_name(train)} val, {model.name}",
    )  # fmt: skip
    training = HeadTraining(
        features, train, val_features, val, schedule,
        folder=folder_for(config.cache, features, train, val, schedule),
        batch=config.batch, threads=config.threads, world=world,
    )  # fmt: skip
    return _result(config, model, features.tokens, train, val, training.run())


def _result(
    config: LinearConfig,
    model: FrozenModel,
    tokens: Tokens,
    train: LabelledImages,
    val: LabelledImages,
    trained: Trained,
) -> Result:
    schedule = config.schedule
    # The first maximum: the earliest epoch, then the smallest rate.
    epoch, head = np.unravel_index(int(trained.accuracy.argmax()), trained.accuracy.shape)
    last = int(trained.accuracy[-1].argmax())
    scores = [
        Score(
            metric="top1",
            value=100 * float(trained.accuracy[at, of]),
            settings={"lr": schedule.rates[of], "epoch": int(at) + 1, "of": what},
        )
        for at, of, what in (
            (epoch, int(head), "best head and epoch"),
            (schedule.epochs - 1, last, "best head of the last epoch"),
        )
    ]
    return Result(
        task=TASK,
        dataset=data_set_name(train),
        model=ModelFacts.of(model),
        scores=scores,
        settings={
            "tokens": tokens,
            "heads": config.heads,
            "epochs": schedule.epochs,
            "global_batch": schedule.global_batch,
            "seed": schedule.seed,
            "momentum": protocol.MOMENTUM,
            "weight_decay": protocol.WEIGHT_DECAY,
            "lr_scale": schedule.global_batch / protocol.LR_BATCH,
            "crop_scale": list(protocol.CROP_SCALE),
            "resize_px": RESIZE_PX,
            "crop_px": CROP_PX,
            "precision": config.precision,
            "train_images": len(train),
            "val_images": len(val),
            "classes": len(val.classes),
            "train_fingerprint": train.source.fingerprint,
            "val_fingerprint": val.source.fingerprint,
            "last_epoch_by_lr": {
                f"{rate:g}": round(100 * float(value), 4)
                for rate, value in zip(schedule.rates, trained.accuracy[-1], strict=True)
            },
        },
        chosen={
            "lr": schedule.rates[int(head)],
            "epoch": int(epoch) + 1,
            "by": "accuracy on the validation images themselves, as iBOT does",
        },
    )


def main(args: Sequence[str]) -> None:
    """The command."""
    import tyro

    config = tyro.cli(LinearConfig, args=args, prog="crisp eval linear", description=__doc__)
    from crisp.models.published import load_frozen

    with evaluation_world(config) as world:
        model = load_frozen(config.weights, device=world.device)
        result = evaluate_linear(config, model, world)
        if world.is_main:
            print_result(result)
            log.info("%s", write_result(config.out, result))
