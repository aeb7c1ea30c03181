"""Reads the folder of a run: everything that the page says of it, as plain values."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crisp.checkpoint import list_checkpoints, list_damaged, step_of
from crisp.config import TrainConfig, to_json
from crisp.errors import CrispError
from crisp.machine import Start, read_starts
from crisp.metrics import read_metrics
from crisp.recipes import RECIPES, recipe_named
from crisp.report.faults import Faults, gather_faults
from crisp.report.pictures import Moment, gather_moments
from crisp.report.quality import Quality, gather_quality
from crisp.run_list import RunSummary, summarise
from crisp.run_state import read_state
from crisp.runs import CHECKPOINTS, KNN_FILE, METRICS_FILE, read_run_config

Lines = Sequence[dict[str, Any]]

_NOT_A_CHOICE = {"recipe", "out"}  # what a run is called and where it lies


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What a run's folder holds."""

    name: str
    """That tells it from the others of the page"""
    folder: Path
    config: dict[str, Any]
    """Fields by dotted name, JSON types"""
    changes: dict[str, tuple[Any, Any]] | None
    """Fields that differ from the recipe: the recipe's value, the run's; None where there is no such recipe now"""
    summary: RunSummary
    metrics: Lines
    knn: Lines
    moments: Sequence[Moment]
    """When it drew pictures of itself"""
    moments_problem: str
    """Why pictures are missing, where some are; else empty"""
    quality: Quality | None
    """Of its regions; None where that was not measured"""
    starts: Sequence[Start]
    event_files: int
    """Of TensorBoard: one per start that logged"""
    checkpoints: Sequence[int]
    """Steps"""
    damaged: Sequence[int]
    """Steps of checkpoints that were set aside"""
    faults: Faults

    @property
    def recipe(self) -> str:
        """That it began as."""
        return str(self.config["recipe"])


def gather_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read every run.

    Raises:
        CrispError: no run given, one given twice, a folder that holds no run, a file that is damaged.
    """
    if not folders:
        raise CrispError("no run given; name its folder, as in 'crisp report runs/vits16'")
    names = _names(folders)
    return [gather_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def gather_run(folder: Path, name: str) -> RunRecord:
    """Read one run.

    Raises:
        CrispError: not a run's folder, or a file in it is damaged.
    """
    config = read_run_config(folder)
    summary = summarise(folder, name=name)
    assert summary is not None, "its config was read"
    if state := read_state(folder):
        # A page is passed on; which machine it was is no business of its readers.
        summary = replace(summary, reason=summary.reason.replace(state.host, "its machine"))
    moments, problem = gather_moments(folder)
    return RunRecord(
        name=name,
        folder=folder,
        config=flat(to_json(config)),
        changes=changes_from_recipe(config),
        summary=summary,
        metrics=_lines(folder / METRICS_FILE),
        knn=_lines(folder / KNN_FILE),
        moments=moments,
        moments_problem=problem,
        quality=gather_quality(folder),
        starts=read_starts(folder),
        event_files=len(list((folder / "tensorboard").glob("events.out.tfevents.*"))),
        checkpoints=[step_of(path) for path in list_checkpoints(folder / CHECKPOINTS)],
        damaged=list_damaged(folder / CHECKPOINTS),
        faults=gather_faults(folder),
    )


def changes_from_recipe(config: TrainConfig) -> dict[str, tuple[Any, Any]] | None:
    """Fields that differ from the recipe of its name: the recipe's value, the run's."""
    if config.recipe not in RECIPES:
        return None
    of_recipe, of_run = flat(to_json(recipe_named(config.recipe))), flat(to_json(config))
    return {
        name: (of_recipe[name], value)
        for name, value in of_run.items()
        if name not in _NOT_A_CHOICE and of_recipe[name] != value
    }


def differences(runs: Sequence[RunRecord]) -> list[str]:
    """Fields that are not the same in all runs."""
    first, *others = (run.config for run in runs)
    return [name for name, value in first.items() if name != "out" and any(o[name] != value for o in others)]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted name, in order."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def _lines(path: Path) -> Lines:
    if not path.exists():
        return []
    try:
        lines = read_metrics(path)
        if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in lines):
            raise ValueError("a line without a step")
    except (OSError, ValueError) as error:
        raise CrispError(f"{path}: not lines of a run ({error}); restore it from a copy, or remove it") from error
    return lines


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names where these differ, else their paths."""
    resolved = [folder.resolve() for folder in folders]
    if twice := next((path for path in resolved if resolved.count(path) > 1), None):
        raise CrispError(f"{twice}: given twice; name each run once")
    names = [path.name for path in resolved]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def shown(value: Any) -> str:
    """A config's value as JSON would have it, strings without quotes."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
