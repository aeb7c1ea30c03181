"""`crisp eval all`: every evaluation whose data lies under one folder, in one table beside the paper's."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from crisp.errors import CrispError
from crisp.evals.config import EvalConfig
from crisp.evals.paper import COLUMNS, ROWS, TITLES
from crisp.evals.results import DIGITS, Score, note_of, summary, write_whole
from crisp.evals.running import evaluation_world
from crisp.evals.suite import Evaluation, Outcome, failures, find_data, run_suite
from crisp.evals.tables import POINT_NOTE, Column, compare, markdown_table, print_comparison
from crisp.models.frozen import FrozenModel

log = logging.getLogger(__name__)

Task = Literal["knn", "seg-knn", "seg-linear", "multilabel", "video", "linear"]
TASKS: tuple[Task, ...] = ("knn", "seg-knn", "seg-linear", "multilabel", "video", "linear")
"""In the order in which they run: the longest last"""
STEM = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class AllConfig(EvalConfig):
    """Run every evaluation whose data lies under one folder, each with its protocol's own choices.

    What ran before with the same weights, data and choices is not run again; each evaluation has its own command for
    other choices. Writes OUT/all.md and OUT/all.json beside each evaluation's own files.
    """

    tasks: tuple[Task, ...] = TASKS
    """Only these."""
    datasets: tuple[str, ...] = ()
    """Only these, as in the names of result files (ade20k, davis2017, …); default: whatever is found."""


def main(args: Sequence[str]) -> None:
    """The command."""
    import tyro

    config = tyro.cli(AllConfig, args=args, prog="crisp eval all")
    from crisp.evals.catalogue import EVALUATIONS
    from crisp.models.published import load_frozen

    evaluations = chosen(config, EVALUATIONS)
    find_data(config.data, evaluations)  # before the weights are read
    with evaluation_world(config) as world:
        model = load_frozen(config.weights, device=world.device)
        outcomes = run_suite(config, model, world, evaluations)
        if world.is_main:
            log.info("%s", write_report(config.out, model, outcomes))
            print_report(model, outcomes)
    if failed := failures(outcomes):
        raise CrispError(f"{len(failed)} of {len(outcomes)} evaluations failed: {', '.join(failed)}; see above")


def chosen(config: AllConfig, evaluations: Sequence[Evaluation[Any]]) -> list[Evaluation[Any]]:
    """Those of the tasks and data sets that the config names, in the order of `TASKS`.

    Raises:
        CrispError: a data set that none of them knows.
    """
    of_tasks = [e for task in TASKS if task in config.tasks for e in evaluations if e.task == task]
    known = sorted({evaluation.dataset for evaluation in of_tasks})
    for dataset in config.datasets:
        if dataset not in known:
            raise CrispError(f"datasets={dataset}: not one of {', '.join(known)}")
    return [evaluation for evaluation in of_tasks if not config.datasets or evaluation.dataset in config.datasets]


# --- the report ------------------------------------------------------------------------------------------------------


def _scores(outcomes: Sequence[Outcome]) -> dict[tuple[str, str, str], Score]:
    """The headline score of each (task, data set, metric)."""
    results = [result for outcome in outcomes for result in outcome.results]
    return {(r.task, r.dataset, metric): score for r in results for metric, score in r.headline().items()}


def paper_tables(outcomes: Sequence[Outcome]) -> dict[int, list[Column]]:
    """The columns of each of the paper's tables of which something was measured."""
    scores = _scores(outcomes)
    tables = {}
    for table, columns in COLUMNS.items():
        found = [scores.get(column[:3]) for column in columns]
        if any(found):
            tables[table] = [
                Column(
                    head=column.head,
                    value=None if score is None else score.value,
                    std=None if score is None else score.std,
                    paper=[row for row in ROWS if (row.task, row.dataset, row.metric) == column[:3]],
                )
                for column, score in zip(columns, found, strict=True)
            ]
    return tables


def _others(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Task on data set, and in a line its scores that none of the paper's tables has."""
    in_tables = {column[:3] for columns in COLUMNS.values() for column in columns}
    lines = []
    for result in (result for outcome in outcomes for result in outcome.results):
        metrics = [m for m in result.headline() if (result.task, result.dataset, m) not in in_tables]
        if metrics:
            lines.append((f"{result.task} on {result.dataset}", summary(result, metrics)))
    return lines


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    notes = [note for o in outcomes for note in (o.note, *map(note_of, o.results))]
    return list(dict.fromkeys(note for note in notes if note))


def write_report(out: Path, model: FrozenModel, outcomes: Sequence[Outcome]) -> Path:
    """Write OUT/all.json and all.md.

    Returns:
        The Markdown file.

    Raises:
        CrispError: they cannot be written.
    """
    write_whole(out / f"{STEM}.json", _report_json(model, outcomes))
    write_whole(out / f"{STEM}.md", _report_markdown(model, outcomes))
    return out / f"{STEM}.md"


def _report_json(model: FrozenModel, outcomes: Sequence[Outcome]) -> str:
    whole = {
        "model": {"name": model.name, "source": model.source, "fingerprint": model.fingerprint},
        "tables": {
            str(table): [_column_json(column) for column in columns]
            for table, columns in paper_tables(outcomes).items()
        },
        "results": [f"{result.stem}.json" for outcome in outcomes for result in outcome.results],
        "not_run": {o.evaluation.name: o.problem for o in outcomes if o.problem},
        "notes": _notes(outcomes),
    }
    return json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _column_json(column: Column) -> Mapping[str, Any]:
    ours = None if column.value is None else round(column.value, DIGITS)
    return {
        "column": column.head,
        "ours": ours,
        "std": None if column.std is None else round(column.std, DIGITS),
        "paper": [
            {
                "model": row.label,
                "arch": row.arch,
                "value": row.value,
                "ours_minus_paper": None if ours is None else round(ours - row.value, DIGITS),
            }
            for row in column.paper
        ],
    }


def _report_markdown(model: FrozenModel, outcomes: Sequence[Outcome]) -> str:
    parts = [f"# {model.name} on the paper's benchmarks\n"]
    tables = paper_tables(outcomes)
    for table, columns in tables.items():
        parts += [f"## {TITLES[table]}\n", markdown_table(*compare(model.name, columns))]
    if any(row.point_restored for columns in tables.values() for column in columns for row in column.paper):
        parts.append(POINT_NOTE)
    parts += [f"{note}\n" for note in _notes(outcomes)]
    if others := _others(outcomes):
        parts += ["## Beside the paper's tables\n", markdown_table(["evaluation", "%"], others)]
    if problems := [o for o in outcomes if o.problem]:
        parts.append("## Not run\n")
        parts.append("".join(f"- {o.evaluation.name}: {o.problem}\n" for o in problems))
    parts.append(f"Weights: `{model.source}`, fingerprint `{model.fingerprint[:16]}`.\n")
    return "\n".join(parts)


def print_report(model: FrozenModel, outcomes: Sequence[Outcome], console: Console | None = None) -> None:
    """The tables on a terminal of 80 columns or more, then what was not run and why."""
    console = console or Console(highlight=False)
    console.print(Text(f"{model.name} on the paper's benchmarks, percent"))
    for table, columns in paper_tables(outcomes).items():
        console.print(Text(f"\n{TITLES[table]} (ours minus the paper's)", style="bold"))
        measured = [column for column in columns if column.value is not None]
        print_comparison(console, model.name, measured)
    for note in _notes(outcomes):
        console.print(Text(note))
    for name, shown in _others(outcomes):
        console.print(Text(f"{name}: {shown}"))
    for outcome in outcomes:
        if outcome.problem:
            kind = "failed" if outcome.failed else "skipped"
            console.print(Text(f"{outcome.evaluation.name}: {kind}, {outcome.problem}"))
