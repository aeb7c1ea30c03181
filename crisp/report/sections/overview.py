"""At a glance: how far each run is, and where it stands."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from crisp.report.blocks import Block, Note, Section, Table
from crisp.report.gather import RunRecord

NOTHING = "–"


def overview(runs: Sequence[RunRecord]) -> Section:
    """A column per run."""
    facts = [_facts(run) for run in runs]
    rows = [[name, *(of_run[name] for of_run in facts)] for name in facts[0]]
    blocks: list[Block] = [Table(caption="", heads=["", *(run.name for run in runs)], rows=rows)]
    blocks += [
        Note(text=f"{run.name} {run.summary.state}: {run.summary.reason}", loud=run.summary.state == "failed")
        for run in runs
        if run.summary.reason
    ]
    return Section(id="overview", title="Overview", blocks=blocks)


def _facts(run: RunRecord) -> dict[str, str]:
    last: dict[str, Any] = run.metrics[-1] if run.metrics else {}
    best = max(run.knn, key=lambda line: line["top1"], default=None)
    return {
        "recipe": run.recipe,
        "state": run.summary.state,
        "steps": f"{run.summary.step:,} of {run.summary.steps:,}" if run.summary.steps else f"{run.summary.step:,}",
        "epochs": str(run.config["optim.epochs"]),
        "loss, last line": number(last.get("loss"), ".3f"),
        "k-NN, last": number(run.knn[-1]["top1"], ".1%") if run.knn else NOTHING,
        "k-NN, best": f"{best['top1']:.1%} at step {best['step']:,}" if best else NOTHING,
        "images/s, median": number(middle(run, "images_per_s"), ".1f"),
        "waiting for data, median": number(middle(run, "data_wait_share"), ".1%"),
        "checkpoints": f"{len(run.checkpoints)}, the last of step {run.checkpoints[-1]:,}"
        if run.checkpoints
        else NOTHING,
    }


def middle(run: RunRecord, key: str) -> float | None:
    """Median over the logged lines."""
    values = [line[key] for line in run.metrics if key in line]
    return median(values) if values else None


def number(value: float | None, form: str) -> str:
    """Formatted, or a dash."""
    return NOTHING if value is None else format(value, form)
