"""Small evaluations for the tests, alone or as one of several ranks."""

from pathlib import Path
from typing import Any

import torch

from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.classification.command_knn import KnnConfig, evaluate_knn
from crisp.evals.classification.command_linear import LinearConfig, evaluate_linear
from crisp.evals.classification.data import open_splits
from crisp.evals.classification.gather import gather_rows, share_of
from crisp.evals.classification.linear import HeadTraining, Schedule
from crisp.evals.features import FrozenFeatures
from crisp.evals.images import CentreCrop
from crisp.evals.results import result_json
from crisp.evals.running import evaluation_world
from crisp.evals.store import FeatureStore
from tests.evals.tiny_backbone import tiny_model


def alone() -> World:
    return World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))


def train(root: Path, cache: Path, world: World, **changes: Any) -> HeadTraining:
    """A training of three epochs with five heads on the tiny model, in float64 so that ranks can be compared."""
    train, val = open_splits(root)
    model = tiny_model()
    features = FrozenFeatures(model, "cls-mean", side_px=224, device=world.device)
    val_features = features.stored(
        FeatureStore(cache / "features"), val.source, CentreCrop(256, 224), batch=4, threads=1, world=world, title="val"
    )
    schedule = Schedule(rates=(0.001, 0.01, 0.1, 0.5, 2.0), epochs=3, global_batch=5, seed=1)
    training = HeadTraining(
        features, train, val_features, val, schedule,
        **{"folder": cache / "heads", "batch": 2, "threads": 1, "world": world, **changes},
    )  # fmt: skip
    for name in ("weight", "bias", "weight_momentum", "bias_momentum"):
        setattr(training.heads, name, getattr(training.heads, name).double())
    return training


def linear_in_ranks(root: str, cache: str) -> dict[str, Any]:
    """Heads and history of `train`, from each rank."""
    with evaluation_world(LinearConfig(weights="tiny:", data=Path(root), device="cpu")) as world:
        training = train(Path(root), Path(cache), world)
        trained = training.run()
        state = {name: tensor.tolist() for name, tensor in training.heads.state().items()}
        return {"state": state, "accuracy": trained.accuracy.tolist(), "losses": trained.losses.tolist()}


def error_in_ranks(root: str, cache: str) -> str:
    """What `train` raises on each rank."""
    with evaluation_world(LinearConfig(weights="tiny:", data=Path(root), device="cpu")) as world:
        try:
            train(Path(root), Path(cache), world).run()
        except CrispError as error:
            return str(error)
    return "no error"


def gathered_in_ranks(count: int) -> list[Any]:
    """Rows 0 … count − 1, each rank having made its share."""
    with evaluation_world(LinearConfig(weights="tiny:", data=Path(), device="cpu")) as world:
        rows = torch.arange(count, dtype=torch.float64)[:, None].repeat(1, 2)
        gathered: list[Any] = gather_rows(rows[share_of(count, world)], count, world).tolist()
        return gathered


def results_in_ranks(root: str, cache: str) -> list[str]:
    """What both commands find, as JSON."""
    knn = KnnConfig(weights="tiny:", data=Path(root), cache=Path(cache), k=(1, 3), device="cpu", threads=1)
    with evaluation_world(knn) as world:
        results = evaluate_knn(knn, tiny_model(), world)
        results.append(evaluate_linear(linear_config(root, cache), tiny_model(), world))
    return [result_json(result) for result in results]


def linear_config(root: str | Path, cache: str | Path, **changes: Any) -> LinearConfig:
    options = {"global_batch": 5, "epochs": 2, "batch": 4, "threads": 1, "device": "cpu", **changes}
    return LinearConfig(weights="tiny:", data=Path(root), cache=Path(cache), **options)
