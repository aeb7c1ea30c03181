"""`crisp eval seg-knn`: semantic segmentation by the pixel labels of the nearest patches of train."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.results import ModelFacts, Result, Score, print_result, write_result
from crisp.evals.running import evaluation_world
from crisp.evals.segmentation import protocol
from crisp.evals.segmentation.bank import Bank
from crisp.evals.segmentation.config import SegKnnConfig
from crisp.evals.segmentation.miou import mean_iou
from crisp.evals.segmentation.prepared import Prepared, SplitArrays, prepare
from crisp.evals.segmentation.protocol import Distance
from crisp.evals.segmentation.scoring import count_predictions
from crisp.evals.segmentation.topk import predict_pixels_grid
from crisp.models.frozen import FrozenModel
from crisp.models.published import load_frozen

log = logging.getLogger(__name__)

TASK = "seg-knn"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Choice = tuple[int, Distance]
"""k, and the distance"""


def main(args: Sequence[str]) -> None:
    """Parse, evaluate, print, and write OUT/seg-knn-DATASET.json and .md."""
    config = tyro.cli(SegKnnConfig, args=args, prog="crisp eval seg-knn")
    with evaluation_world(config) as world:
        model = load_frozen(config.weights, device=world.device)
        result = evaluate_knn(config, model, world)
        if world.is_main:
            print_result(result)
            log.info("%s", write_result(config.out, result))


def evaluate_knn(config: SegKnnConfig, model: FrozenModel, world: World) -> Result:
    """mIoU on the validation split, with k and distance chosen on a held-out tenth of train. Collective.

    Args:
        config: its `weights`, `out` and `device` are not looked at.
        model: on the device of `world`.
        world: this rank's.

    Returns:
        The score on the validation split, and those on the held-out tenth after it.

    Raises:
        CrispError: whatever of data and config does not fit together, found before features are extracted.
    """
    choices: list[Choice] = [(k, distance) for k in config.ks for distance in config.distances]

    def check(patches: int) -> None:
        if max(config.ks) > patches:
            raise CrispError(
                f"ks={config.ks}: train has {patches} labelled patches to fit on; give smaller numbers of neighbours"
            )

    prepared = prepare(config, model, world, search=len(choices) > 1, check=check)
    dtype_name = _dtype_name(config, prepared)
    held_out: Mapping[Choice, float] = {}
    best = choices[0]
    if len(choices) > 1:
        bank = prepared.bank(prepared.fit)
        held_out = _score(choices, prepared, bank, prepared.train, prepared.held_out, config, dtype_name, world)
        best = max(choices, key=held_out.__getitem__)  # the first of equals
        del bank
    bank = prepared.bank(prepared.train.images)
    (score,) = _score([best], prepared, bank, prepared.val, prepared.val.images, config, dtype_name, world).values()
    return Result(
        task=TASK,
        dataset=prepared.data.slug,
        model=ModelFacts.of(model),
        scores=[
            Score(metric="mIoU", value=100 * score, settings={**_settings(best), "on": prepared.data.val.name}),
            *(
                Score(metric="mIoU", value=100 * value, settings={**_settings(choice), "on": "held-out tenth of train"})
                for choice, value in held_out.items()
            ),
        ],
        settings={
            **prepared.settings,
            "ks": list(config.ks),
            "distances": list(config.distances),
            "dtype": dtype_name,
            "bank_patches": len(bank),
        },
        chosen=_settings(best) if len(choices) > 1 else {},
    )


def _dtype_name(config: SegKnnConfig, prepared: Prepared) -> str:
    if config.dtype != "auto":
        return config.dtype
    return protocol.ADE20K_DTYPE if prepared.data.slug == "ade20k" else "fp32"


def _settings(choice: Choice) -> dict[str, Any]:
    return {"k": choice[0], "distance": choice[1]}


def _score(
    choices: list[Choice],
    prepared: Prepared,
    bank: Bank,
    split: SplitArrays,
    images: NDArray[np.int64],
    config: SegKnnConfig,
    dtype_name: str,
    world: World,
) -> dict[Choice, float]:
    """mIoU in [0, 1] of each choice on some images; the choices are a grid of k and distance."""

    def predict(queries: Tensor) -> dict[Choice, Tensor]:
        return predict_pixels_grid(
            queries,
            cast(NDArray[np.float32], bank.features),  # read piece by piece, as a memory map would be
            bank.labels,
            ks=sorted({k for k, _ in choices}),
            distances=list(dict.fromkeys(distance for _, distance in choices)),
            key_chunk=config.key_chunk,
            query_chunk=config.query_chunk,
            dtype=DTYPES[dtype_name],
        )

    counts = count_predictions(predict, choices, split, images, prepared.standardiser, world)
    scores = {choice: mean_iou(counts[choice], prepared.data.labels.ignored) for choice in choices}
    if world.is_main:
        for (k, distance), score in scores.items():
            log.info("k=%d %s: mIoU %.2f %% on %d images", k, distance, 100 * score, len(images))
    return scores
