"""Every evaluation beside the paper's figures."""

from collections.abc import Sequence

from crisp.evals.results import DIGITS, note_of, result_columns
from crisp.evals.tables import MISSING, describe, difference, figure
from crisp.report.blocks import Block, Note, Section, Table
from crisp.report.evaluations import Found
from crisp.report.gather import RunRecord


def scores(runs: Sequence[RunRecord], found: Sequence[Found], others: Sequence[str]) -> Section:
    """A table per task and data set: ours first, then the paper's rows with our difference from each."""
    blocks: list[Block] = []
    seen = {one.run for one in found}
    for number, run in enumerate(runs):
        if number not in seen:
            blocks.append(
                Note(text=f"{run.name}: no result of crisp eval in {run.name}/evals or in a folder given with --evals.")
            )
    for stem in dict.fromkeys(one.result.stem for one in found):
        blocks += _one(runs, [one for one in found if one.result.stem == stem])
    if others:
        blocks.append(Note(text=f"Passed over, no results of crisp eval: {', '.join(others)}."))
    return Section(id="evaluations", title="Evaluations beside the paper", blocks=blocks)


def _one(runs: Sequence[RunRecord], found: Sequence[Found]) -> list[Block]:
    task, dataset = found[0].result.task, found[0].result.dataset
    columns = [{column.head: column for column in result_columns(one.result)} for one in found]
    metrics = list(dict.fromkeys(head for of_one in columns for head in of_one))
    paper = {metric: next(c for c in columns if metric in c)[metric].paper for metric in metrics}
    names = [_name(runs, one) for one in found]
    heads = ["model", "weights"]
    for metric in metrics:
        heads += [metric, *(f"{name} −" if len(found) > 1 else "ours −" for name in names if paper[metric])]
    rows = []
    for name, one, of_one in zip(names, found, columns, strict=True):
        row = [name, one.result.model.name if one.run is not None else one.result.model.source]
        for metric in metrics:
            ours = of_one.get(metric)
            row.append(MISSING if ours is None or ours.value is None else figure(ours.value, ours.std))
            row += [""] * (len(found) if paper[metric] else 0)
        rows.append(row)
    for label, arch in dict.fromkeys((row.label, row.arch) for of_metric in paper.values() for row in of_metric):
        line = [label, arch]
        for metric in metrics:
            theirs = next((row for row in paper[metric] if (row.label, row.arch) == (label, arch)), None)
            line.append(MISSING if theirs is None else f"{theirs.value:.1f}")
            for of_one in columns if paper[metric] else ():
                ours = of_one.get(metric)
                missing = theirs is None or ours is None or ours.value is None
                line.append("" if missing else difference(ours.value, theirs.value))  # type: ignore[union-attr, arg-type]
        rows.append(line)
    blocks: list[Block] = [
        Table(caption=f"{task} on {dataset}, percent", heads=heads, rows=rows, words=2, ours=len(found))
    ]
    if not any(paper.values()):
        blocks.append(Note(text=f"The paper has no figures for {task} on {dataset}."))
    if any(row.point_restored for of_metric in paper.values() for row in of_metric):
        blocks.append(Note(text="Some of the paper's figures lost their decimal point in its text; it is put back."))
    every = [
        [name, score.metric, describe(score.settings), f"{score.value:.{DIGITS}g}"]
        for name, one in zip(names, found, strict=True)
        for score in one.result.scores
    ]
    heads = ["model", "metric", "settings", "%"]
    blocks.append(Table(caption=f"All scores of {task} on {dataset}", heads=heads, rows=every, words=3, folded=True))
    for name, one in zip(names, found, strict=True):
        told = [f"chosen: {describe(one.result.chosen)}" if one.result.chosen else "", note_of(one.result)]
        blocks += [Note(text=f"{name}, {words}") for words in told if words]
    return blocks


def _name(runs: Sequence[RunRecord], one: Found) -> str:
    return one.result.model.name if one.run is None else runs[one.run].name
