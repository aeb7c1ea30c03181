"""A run's folder: its config, and what a resumed run may change.

RUN/config.json  state.json  machine.json  metrics.jsonl  knn.jsonl  tensorboard/  checkpoints/step-N/
RUN/pictures/index.json  pictures/step-N/{regions,pca}.png  faults/rank-R.jsonl
"""

import dataclasses
import json
from pathlib import Path

from crisp.config import TrainConfig, to_json, train_config_from_json
from crisp.errors import CrispError

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
FAULTS = "faults"
METRICS_FILE = "metrics.jsonl"
KNN_FILE = "knn.jsonl"
PICTURES = "pictures"
PICTURES_INDEX = "index.json"
QUALITY_FILE = "region_quality.json"

# What changes no sample, and no weight beyond rounding: only these may differ between a run and its continuation.
FREE_ON_RESUME = {
    "device", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "keep_best", "rank_timeout_s",
    "parallel", "optim.micro_batch", "model.recompute", "model.compile", "max_skipped_steps",
    "data.shards", "data.renderer", "data.threads", "data.read_threads", "data.prefetch_batches",
    "data.verify_checksums", "data.max_bad_share", "data.sample_timeout_s", "data.cache", "data.cache_gb",
    "data.dali.workers", "data.dali.hardware_decoder_share",
    "data.dali.preallocate_width_px", "data.dali.preallocate_height_px",
    "knn.every_epochs", "knn.train_shards", "knn.val_shards", "knn.k", "knn.max_train", "knn.max_val",
    "pictures.every_epochs", "pictures.images", "pictures.shards", "pictures.pca_px",
    "wandb.project", "wandb.entity", "wandb.mode",
}  # fmt: skip


def check_free(run: Path) -> None:
    """Refuse a folder that a new run must not write into.

    Raises:
        CrispError: it already holds a run.
    """
    if (run / CONFIG_FILE).exists() or (run / CHECKPOINTS).exists():
        raise CrispError(
            f"{run}: already holds a run; continue it with 'crisp train --resume {run}', or choose another folder "
            f"with --out"
        )


def create_run(config: TrainConfig) -> None:
    """Make the folder of a new run and write its config.

    Raises:
        CrispError: it cannot be written.
    """
    run = config.run_folder
    try:
        run.mkdir(parents=True, exist_ok=True)
        partial = run / f".{CONFIG_FILE}.partial"
        partial.write_text(json.dumps(to_json(config), indent=2) + "\n")
        partial.rename(run / CONFIG_FILE)
    except OSError as error:
        raise CrispError(f"{run}: cannot be written ({error}); choose another folder with --out") from error


def read_run_config(run: Path) -> TrainConfig:
    """The config of a run, with `out` set to where it is now.

    Raises:
        CrispError: not a run's folder.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise CrispError(f"{run}: no {CONFIG_FILE}, so not the folder of a run; give one that 'crisp train' wrote")
    try:
        config = train_config_from_json(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise CrispError(f"{path}: not a config ({error}); restore it from a copy") from error
    return dataclasses.replace(config, out=run)


def _leaves(config: object, prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= _leaves(value, f"{prefix}{field.name}.")
        else:
            leaves[f"{prefix}{field.name}"] = value
    return leaves


def check_resumable(written: TrainConfig, asked: TrainConfig) -> None:
    """Refuse a continuation that would be another run.

    Raises:
        CrispError: a field that samples or weights depend on differs.
    """
    before, now = _leaves(written), _leaves(asked)
    for name, value in now.items():
        if name not in FREE_ON_RESUME and before[name] != value:
            raise CrispError(
                f"{name}={value}: the run has {before[name]} and cannot be continued with another value; "
                f"leave it, or start a new run"
            )
