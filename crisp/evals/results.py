"""What an evaluation found: as JSON that two runs write alike, and as a table beside the paper's figures.

The JSON holds nothing that differs between two runs of one evaluation: no times, no machine. Names of tasks and data
sets are those of `crisp.evals.paper`, so that the paper's rows are found.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crisp.errors import CrispError
from crisp.evals.paper import PaperRow, rows
from crisp.models.frozen import FrozenModel

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
    """All that the scores depend on beside the model: the protocol's constants, the data's fingerprint, …"""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters that the evaluation itself chose"""

    def headline(self) -> dict[str, Score]:
        """The score of each metric to compare."""
        return {score.metric: score for score in reversed(self.scores)}

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


# --- beside the paper ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PaperModel:
    """A model's figures of one task and data set."""

    label: str
    arch: str
    figures: Mapping[str, PaperRow]
    """By metric"""


def paper_models(task: str, dataset: str) -> list[PaperModel]:
    """The paper's models for an evaluation, in print order."""
    found: dict[tuple[str, str], dict[str, PaperRow]] = {}
    for row in rows(task, dataset):
        found.setdefault((row.label, row.arch), {})[row.metric] = row
    return [PaperModel(label, arch, figures) for (label, arch), figures in found.items()]


def figure(score: Score) -> str:
    """28.2, or 49.3 ± 0.8."""
    return f"{score.value:.1f}" if score.std is None else f"{score.value:.1f} ± {score.std:.1f}"


def difference(ours: float, row: PaperRow) -> str:
    """Ours minus the paper's, signed, of figures with one digit as in the paper."""
    value = round(round(ours, 1) - row.value, 1)
    return "±0.0" if value == 0 else f"{value:+.1f}".replace("-", "−")


def _cells(result: Result, metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the comparison: ours, then the paper's with what ours is above them."""
    ours = result.headline()
    lines = [[result.model.name, "", *(cell for metric in metrics for cell in (figure(ours[metric]), ""))]]
    for model in paper_models(result.task, result.dataset):
        line = [model.label, model.arch]
        for metric in metrics:
            row = model.figures.get(metric)
            line += ["–", ""] if row is None else [f"{row.value:.1f}", difference(ours[metric].value, row)]
        lines.append(line)
    return ["model", "arch", *(cell for metric in metrics for cell in (metric, "ours −"))], lines


def _compared(result: Result) -> list[str]:
    """The metrics of the comparison: those that the paper has, or all where it has none."""
    papers = {row.metric for row in rows(result.task, result.dataset)}
    metrics = list(dict.fromkeys(score.metric for score in result.scores))
    return [metric for metric in metrics if metric in papers] or metrics


def _further(result: Result, compared: Sequence[str]) -> list[Score]:
    """Scores that the comparison leaves out, and all of a metric if one of them says how it came about."""
    told = {score.metric for score in result.scores if score.settings or score.metric not in compared}
    return [score for score in result.scores if score.metric in told]


def _described(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def result_markdown(result: Result) -> str:
    """A page: the table beside the paper's rows, all scores, what was chosen, all settings."""
    compared = _compared(result)
    heads, lines = _cells(result, compared)
    parts = [f"# {result.task} on {result.dataset}: {result.model.name}\n", markdown_table(heads, lines)]
    if len(lines) == 1:
        parts.append("The paper has no figures for this.\n")
    elif any(row.point_restored for row in rows(result.task, result.dataset)):
        parts.append(POINT_NOTE)
    if further := _further(result, compared):
        told = [[score.metric, _described(score.settings), figure(score)] for score in further]
        parts.append(markdown_table(["metric", "settings", "%"], told))
    if result.chosen:
        parts.append("Chosen: " + _described(result.chosen) + "\n")
    facts = result.model
    parts.append(
        f"Weights: `{facts.source}`, fingerprint `{facts.fingerprint[:16]}`, {facts.depth} blocks of width "
        f"{facts.dim}, patches of {facts.patch_px} px.\n"
    )
    parts.append("```json\n" + json.dumps(result.settings, sort_keys=True, indent=2, ensure_ascii=False) + "\n```\n")
    return "\n".join(parts)


POINT_NOTE = (
    "Some of the paper's figures lost their decimal point in the text that they were read from; it is put back "
    "(`crisp/evals/paper.py` marks them).\n"
)


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns padded, so that it reads as plain text, too; all but the first two to the right."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (heads, *lines)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(heads))]
    rule = [("-" * width) if i < 2 else ("-" * (width - 1) + ":") for i, width in enumerate(widths)]
    padded = [
        [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in pairs]
        for pairs in (enumerate(zip(line, widths, strict=True)) for line in (cells[0], rule, *cells[1:]))
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in padded)


def print_result(result: Result, console: Console | None = None) -> None:
    """The comparison on a terminal of 80 columns or more, in several tables if it has many metrics; then the rest."""
    console = console or Console(highlight=False)
    compared = _compared(result)
    console.print(f"{result.task} on {result.dataset}, percent", markup=False)
    for metrics in _groups(result, compared, console.width):
        console.print(_terminal_table(*_cells(result, metrics)))
    for score in _further(result, compared):
        console.print(f"{score.metric} {figure(score)}  {_described(score.settings)}", markup=False)
    if result.chosen:
        console.print("chosen: " + _described(result.chosen), markup=False)


_NAME_WIDTH = 26
_GAP = 2


def _terminal_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for i, head in enumerate(heads):
        limit = _NAME_WIDTH if i == 0 else None
        table.add_column(
            Text(head), justify="right" if i > 1 else "left", no_wrap=True, overflow="ellipsis", max_width=limit
        )  # fmt: skip
    for i, line in enumerate(lines):
        table.add_row(*map(Text, line), style="bold" if i == 0 else None)
    return table


def _groups(result: Result, metrics: Sequence[str], width: int) -> Iterator[list[str]]:
    """The metrics in runs that fit beside the models' names."""
    group: list[str] = []
    for metric in metrics:
        console = Console(width=10 * width)  # to measure, not to print
        wanted = console.measure(_terminal_table(*_cells(result, [*group, metric]))).maximum
        if group and wanted > width:
            yield group
            group = []
        group.append(metric)
    yield group
