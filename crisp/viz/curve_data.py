"""What runs wrote while they went on, and what evaluations found of their checkpoints, as values against epochs."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.metrics import read_metrics
from crisp.run_state import read_state
from crisp.runs import CHECKPOINTS, KNN_FILE, METRICS_FILE, read_run_config

log = logging.getLogger(__name__)

KNN = "knn"
"""Key of the accuracy of k-NN during the run, in percent"""
EVALS = "evals"
"""Folder in a run where results of `crisp eval` are looked for, at any depth"""

_STEP = re.compile(r"(?:step[ -])0*(\d+)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One quantity of one run."""

    epochs: NDArray[np.float64]
    """[T] ascending"""
    values: NDArray[np.float64]
    """[T] finite"""
    logged: bool
    """A line of metrics.jsonl, of which there are many, and not a measurement"""


def read_curves(run: Path, evals: Sequence[Path] = ()) -> dict[str, Curve]:
    """All that a run and evaluations of it have, by key.

    Keys are those of metrics.jsonl, `KNN`, and `TASK DATASET METRIC` of evaluations, whose first score of a metric
    counts. Of two results for one step the later file in the order of paths counts.

    Args:
        run: its folder.
        evals: folders with further results; those of this run's checkpoints are taken.

    Raises:
        CrispError: not a run, or one without a line yet.
    """
    config = read_run_config(run)
    lines = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else []
    if not lines:
        raise CrispError(f"{run}: no line in {METRICS_FILE} yet; let the run log some steps first")
    state = read_state(run)
    if state is not None:
        per_epoch = state.steps / config.optim.epochs
    else:
        per_epoch = lines[-1]["step"] / (lines[-1]["epoch"] + 1)
        log.warning("%s: no state.json, so %g steps per epoch are assumed from its last line", run, per_epoch)
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for key, value in line.items():
            if key not in ("step", "epoch") and isinstance(value, int | float):
                found.setdefault(key, {})[line["step"]] = float(value)
    logged = set(found)
    if (run / KNN_FILE).is_file():
        found[KNN] = {line["step"]: 100 * line["top1"] for line in read_metrics(run / KNN_FILE)}
    for folder in (run / EVALS, *evals):
        for step, key, value in _results(folder, run, own=folder == run / EVALS):
            found.setdefault(key, {})[step] = value
    curves = {key: _curve(values, per_epoch, logged=key in logged) for key, values in found.items()}
    return {key: curve for key, curve in curves.items() if len(curve.values)}


def _curve(values: Mapping[int, float], per_epoch: float, *, logged: bool) -> Curve:
    steps = np.array(sorted(values), np.float64)
    numbers = np.array([values[int(step)] for step in steps], np.float64)
    finite = np.isfinite(numbers)
    return Curve(epochs=steps[finite] / per_epoch, values=numbers[finite], logged=logged)


def _results(folder: Path, run: Path, *, own: bool) -> Iterator[tuple[int, str, float]]:
    """Step, key and percent of every result of `crisp eval` in a folder that is of a checkpoint of the run."""
    for path in sorted(folder.rglob("*.json")):
        try:
            result: dict[str, Any] = json.loads(path.read_text())
            model, scores = result["model"], result["scores"]
            task, dataset = result["task"], result["dataset"]
            step = _STEP.search(model["name"]) or _STEP.search(model["source"])
            if step is None or not (own or _is_of(model["source"], run)):
                continue
            first: dict[str, float] = {}
            for score in scores:
                first.setdefault(score["metric"], float(score["value"]))
        except (OSError, ValueError, KeyError, TypeError):
            log.info("%s: not a result of crisp eval, passed over", path)
            continue
        for metric, value in first.items():
            yield int(step[1]), f"{task} {dataset} {metric}", value


def _is_of(source: str, run: Path) -> bool:
    path = Path(source).resolve()
    return run.resolve() in (path, path.parent.parent if path.parent.name == CHECKPOINTS else path)
