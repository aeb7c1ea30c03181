"""What is looked at: pictures over time, and the quality of the regions in figures."""

from collections.abc import Sequence

from crisp.report.blocks import Block, Filmstrip, Note, Section, Slider
from crisp.report.gather import RunRecord
from crisp.report.pictures import encode, said
from crisp.report.quality import KINDS
from crisp.report.sections.series import chart_of_lines

PICTURE_CHARACTERS = 6_500_000
"""That all pictures of a page may take together"""
_TITLES = {"regions": "discovered regions", "pca": "first three principal components of the patches"}


def pictures(runs: Sequence[RunRecord]) -> Section:
    """One slider for all: each run shows the newest picture up to the slider's step."""
    blocks: list[Block] = []
    kinds = {(run.name, kind): None for run in runs for moment in run.moments for kind in moment.files}
    budget = PICTURE_CHARACTERS // max(1, len(kinds))
    strips = []
    for run in runs:
        if run.moments_problem:
            blocks.append(Note(text=f"{run.name}: {run.moments_problem}", loud=True))
        elif not run.moments:
            text = "drew no pictures of itself (--pictures.every-epochs): there is no pictures/index.json."
            blocks.append(Note(text=f"{run.name} {text}"))
        for kind in dict.fromkeys(kind for moment in run.moments for kind in moment.files):
            shown = encode(run.moments, kind, budget=budget)
            strips.append(Filmstrip(title=f"{run.name}: {_TITLES.get(kind, kind)}", pictures=shown))
            drawn = sum(kind in moment.files for moment in run.moments)
            if len(shown) < drawn:
                blocks.append(Note(text=f"{run.name}: {len(shown)} of {drawn} pictures of kind {kind} have room here."))
    if strips:
        steps = sorted({picture.step for strip in strips for picture in strip.pictures})
        names = {moment.step: said(moment) for run in runs for moment in run.moments}
        blocks.append(Slider(moments=[(step, names[step]) for step in steps], strips=strips))
    return Section(id="pictures", title="Regions and components over time", blocks=blocks)


def quality(runs: Sequence[RunRecord], limit: int) -> Section:
    """Discovered regions against true segments, with random regions beside."""
    blocks: list[Block] = []
    for run in runs:
        if run.quality is None:
            text = "no region_quality.json; crisp eval region-quality with --all-checkpoints writes it."
            blocks.append(Note(text=f"{run.name}: {text}"))
        elif run.quality.problem:
            blocks.append(Note(text=f"{run.name}: {run.quality.problem}", loud=True))
    scored = [(i, run, run.quality) for i, run in enumerate(runs) if run.quality and run.quality.lines]
    for dataset in dict.fromkeys(name for *_, found in scored for name in found.datasets):
        for measure in dict.fromkeys(m for *_, found in scored for m in found.measures(dataset)):
            lines = [
                (i, dash, name if len(runs) == 1 else f"{run.name}, {name}", found.values(dataset, kind, measure))
                for i, run, found in scored
                for dash, (kind, name) in enumerate(KINDS.items())
            ]
            blocks += chart_of_lines(f"{measure} on {dataset}", lines, measure, limit=limit)
    return Section(id="quality", title="Quality of the regions", blocks=blocks)
