"""What an evaluation found: as JSON that two runs write alike, and as a table beside the paper's figures.

The JSON holds nothing that differs between two runs of one evaluation: no times, no machine. Names of tasks and data
sets are those of `crisp.evals.paper`, so that the paper's rows are found.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from crisp.errors import CrispError
from crisp.evals.paper import rows
from crisp.evals.tables import POINT_NOTE, Column, compare, describe, figure, markdown_table, print_comparison
from crisp.models.frozen import FrozenModel

log = logging.getLogger(__name__)

DIGITS = 4
"""Percentages are stored to so many digits after the point"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Which model was evaluated."""

    name: str
    source: str
    fingerprint: str
    dim: int
    depth: int
    patch_px: int

    @staticmethod
    def of(model: FrozenModel) -> "ModelFacts":
        """From the model."""
        return ModelFacts(
            name=model.name,
            source=model.source,
            fingerprint=model.fingerprint,
            dim=model.backbone.dim,
            depth=model.backbone.depth,
            patch_px=model.backbone.patch_px,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One figure."""

    metric: str
    """As in `crisp.evals.paper`: mIoU, top1, mAP, mAP-1shot, J&F, J, F; or one that the paper lacks"""
    value: float
    """Percent"""
    std: float | None = None
    """Percent, where several splits were scored"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What tells it from other scores of this metric: {"k": 20}"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One evaluation of one model on one data set."""

    task: str
    dataset: str
    model: ModelFacts
    scores: Sequence[Score]
    """The first of a metric is the one to compare; others of it are listed below"""
    settings: Mapping[str, Any]
    """All that the scores depend on beside the model: the protocol's constants, the data's fingerprint, …; and as
    `note` what a reader of the scores must know"""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters that the evaluation itself chose"""

    def headline(self) -> dict[str, Score]:
        """The score of each metric to compare, in order."""
        first: dict[str, Score] = {}
        for score in self.scores:
            first.setdefault(score.metric, score)
        return first

    @property
    def stem(self) -> str:
        """Of its files' names."""
        return f"{self.task}-{self.dataset}"


def result_json(result: Result) -> str:
    """Sorted keys, figures rounded to `DIGITS`."""
    plain = asdict(result)
    for score in plain["scores"]:
        score["value"] = round(float(score["value"]), DIGITS)
        score["std"] = None if score["std"] is None else round(float(score["std"]), DIGITS)
    try:
        return json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise CrispError(f"{result.stem}: a figure is not a number ({error}); the features are damaged") from error


def write_result(out: Path, result: Result) -> Path:
    """Write OUT/TASK-DATASET.json and .md; for the main rank.

    Returns:
        The JSON file.

    Raises:
        CrispError: they cannot be written, or a figure is not finite.
    """
    path = out / f"{result.stem}.json"
    if (before := result_if_any(path)) is not None and before.model.fingerprint != result.model.fingerprint:
        log.warning("%s: replaces the result of %s (%s)", path, before.model.name, before.model.source)
    write_whole(path.with_suffix(".md"), result_markdown(result))
    write_whole(path, result_json(result))
    return path


def write_whole(path: Path, text: str) -> None:
    """A text file that is whole or as it was before.

    Raises:
        CrispError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text)
        partial.rename(path)
    except OSError as error:
        raise CrispError(f"{path}: cannot be written ({error.strerror}); choose another folder with --out") from error


def read_result(path: Path) -> Result:
    """What `write_result` wrote.

    Raises:
        CrispError: no such file, or not a result.
    """
    try:
        plain = json.loads(path.read_text())
        model, scores = ModelFacts(**plain.pop("model")), [Score(**score) for score in plain.pop("scores")]
        return Result(model=model, scores=scores, **plain)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CrispError(f"{path}: not a result of crisp eval ({error}); remove it and evaluate again") from error


def result_if_any(path: Path) -> Result | None:
    """As `read_result`, but None where there is no such file, or another one of its name."""
    try:
        return read_result(path)
    except CrispError:
        return None


# --- beside the paper ------------------------------------------------------------------------------------------------


def note_of(result: Result) -> str:
    """What a reader of its scores must know, if the evaluation says something: `settings["note"]`."""
    return str(result.settings.get("note", ""))


def result_columns(result: Result) -> list[Column]:
    """What is compared: the metrics that the paper has, or all where it has none."""
    papers = rows(result.task, result.dataset)
    ours = result.headline()
    known = [metric for metric in ours if any(row.metric == metric for row in papers)]
    return [
        Column(
            head=metric,
            value=ours[metric].value,
            std=ours[metric].std,
            paper=[row for row in papers if row.metric == metric],
        )
        for metric in known or ours
    ]


def _further(result: Result, columns: Sequence[Column]) -> list[Score]:
    """Scores that the comparison leaves out, and all of a metric if one of them says how it came about."""
    compared = {column.head for column in columns}
    told = {score.metric for score in result.scores if score.settings or score.metric not in compared}
    return [score for score in result.scores if score.metric in told]


def result_markdown(result: Result) -> str:
    """A page: the table beside the paper's rows, all scores, what was chosen, all settings."""
    columns = result_columns(result)
    parts = [f"# {result.task} on {result.dataset}: {result.model.name}\n"]
    parts.append(markdown_table(*compare(result.model.name, columns)) if columns else _NO_SCORES + "\n")
    if columns and not any(column.paper for column in columns):
        parts.append("The paper has no figures for this.\n")
    if any(row.point_restored for column in columns for row in column.paper):
        parts.append(POINT_NOTE)
    if further := _further(result, columns):
        told = [[score.metric, describe(score.settings), figure(score.value, score.std)] for score in further]
        parts.append(markdown_table(["metric", "settings", "%"], told))
    if result.chosen:
        parts.append("Chosen: " + describe(result.chosen) + "\n")
    if note := note_of(result):
        parts.append(note + "\n")
    facts = result.model
    parts.append(
        f"Weights: `{facts.source}`, fingerprint `{facts.fingerprint[:16]}`, {facts.depth} blocks of width "
        f"{facts.dim}, patches of {facts.patch_px} px.\n"
    )
    parts.append("```json\n" + json.dumps(result.settings, sort_keys=True, indent=2, ensure_ascii=False) + "\n```\n")
    return "\n".join(parts)


def summary(result: Result, metrics: Sequence[str] | None = None) -> str:
    """`J&F 62.1, J 60.4`: the scores to compare in a line, or some of them."""
    shown = {m: score for m, score in result.headline().items() if metrics is None or m in metrics}
    return ", ".join(f"{metric} {figure(score.value, score.std)}" for metric, score in shown.items())


_NO_SCORES = "No scores: the truth is hidden or absent."


def print_result(result: Result, console: Console | None = None) -> None:
    """The comparison on a terminal of 80 columns or more, in several tables if it has many metrics; then the rest."""
    console = console or Console(highlight=False)
    columns = result_columns(result)
    brackets = " (ours minus the paper's)" if any(column.paper for column in columns) else ""
    console.print(Text(f"{result.task} on {result.dataset}: {result.model.name}"))
    console.print(Text(f"percent{brackets}" if columns else _NO_SCORES))
    print_comparison(console, result.model.name, columns)
    for score in _further(result, columns):
        console.print(Text(f"{score.metric} {figure(score.value, score.std)}  {describe(score.settings)}"))
    if result.chosen:
        console.print(Text("chosen: " + describe(result.chosen)))
    if note := note_of(result):
        console.print(Text(note))
