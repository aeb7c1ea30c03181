"""Curves of what was logged: losses, schedules, speed, regions, k-NN, and how healthy the steps were."""

from collections.abc import Sequence

from crisp.report.blocks import Block, Note, Section, Table
from crisp.report.curves import curve_of, total_of_restarting
from crisp.report.gather import RunRecord
from crisp.report.sections.overview import middle, number
from crisp.report.sections.series import chart, chart_of_lines, nothing_logged

_KINDS = {"cls": "[CLS]", "patch": "patch", "region": "region"}


def losses(runs: Sequence[RunRecord], limit: int) -> Section:
    """The total and its three terms, each on its own scale."""
    names = {"loss": "Total loss", "loss_cls": "[CLS] loss", "loss_patch": "Patch loss", "loss_region": "Region loss"}
    blocks = nothing_logged(runs)
    for key, name in names.items():
        blocks += chart(runs, name, {key: ""}, limit=limit, smooth=True)
    return Section(id="losses", title="Losses", blocks=blocks)


def schedules(runs: Sequence[RunRecord], limit: int) -> Section:
    """What moved by plan."""
    names = {
        "learning_rate": "Learning rate",
        "teacher_temperature": "Teacher's temperature",
        "ema_momentum": "Teacher's momentum",
        "weight_decay": "Weight decay",
    }
    blocks: list[Block] = []
    for key, name in names.items():
        blocks += chart(runs, name, {key: ""}, limit=limit)
    return Section(id="schedules", title="Schedules", blocks=blocks)


def speed(runs: Sequence[RunRecord], limit: int) -> Section:
    """Throughput, and how much of a step is waiting for data."""
    keys = {"images_per_s": ".1f", "step_s": ".3f", "data_wait_s": ".4f", "data_wait_share": ".2%"}
    blocks: list[Block] = [
        Table(
            caption="Medians of the logged lines",
            heads=["run", "images/s", "step, s", "waiting for data, s", "share of the step"],
            rows=[[run.name, *(number(middle(run, key), form) for key, form in keys.items())] for run in runs],
        )
    ]
    blocks += chart(runs, "Images per second", {"images_per_s": ""}, limit=limit)
    blocks += chart(
        runs, "Share of the time spent waiting for data", {"data_wait_share": ""}, limit=limit, percent=True
    )
    blocks += chart(runs, "Seconds per step", {"step_s": ""}, limit=limit)
    return Section(id="speed", title="Speed and data wait", blocks=blocks)


def regions(runs: Sequence[RunRecord], limit: int) -> Section:
    """How many regions both views show, and how large they are there."""
    blocks: list[Block] = [
        Note(text=f"{run.name} has the region loss off (region.enabled=false).")
        for run in runs
        if not run.config["region.enabled"]
    ]
    blocks += chart(runs, "Valid regions, share", {"region_valid_frac": ""}, limit=limit, percent=True, smooth=True)
    blocks += chart(runs, "Valid regions per step", {"regions_valid": ""}, limit=limit, smooth=True)
    views = {"region_patches_view1": "view 1", "region_patches_view2": "view 2"}
    blocks += chart(runs, "Patches of a region, mean", views, limit=limit, smooth=True)
    return Section(id="regions", title="Regions", blocks=blocks)


def knn(runs: Sequence[RunRecord], limit: int) -> Section:
    """Online k-NN accuracy."""
    blocks: list[Block] = [
        Note(text=f"{run.name} measured no k-NN accuracy (knn.every_epochs={run.config['knn.every_epochs']}).")
        for run in runs
        if not run.knn
    ]
    measured = [(i, run) for i, run in enumerate(runs) if run.knn]
    lines = [(i, 0, f"{run.name}, k = {run.knn[-1].get('k', '?')}", run.knn) for i, run in measured]
    blocks += chart_of_lines("k-NN accuracy of the teacher's [CLS]", lines, "top1", limit=limit)
    if measured:
        rows = [[run.name, f"{line['step']:,}", f"{line['top1']:.2%}"] for _, run in measured for line in run.knn]
        table = Table(caption="All measurements", heads=["run", "step", "top-1"], rows=rows, folded=True)
        blocks.append(table)
    return Section(id="knn", title="k-NN over time", blocks=blocks)


def health(runs: Sequence[RunRecord], limit: int) -> Section:
    """Gradients, skipped steps, and the signs of a collapse."""
    rows = [[run.name, skipped_steps(run)] for run in runs]
    blocks: list[Block] = [
        Table(caption="Steps skipped because a gradient was not finite", heads=["run", "steps"], rows=rows)
    ]
    blocks += chart(
        runs,
        "Gradient norm before clipping (last step of a line)",
        {"gradient_norm": ""},
        limit=limit,
        logarithmic=True,
    )
    entropies = {f"teacher_entropy_{kind}": name for kind, name in _KINDS.items()}
    blocks += chart(
        runs, "Entropy of the teacher's targets over log P (1: uniform, 0: one prototype)", entropies, limit=limit
    )
    norms = {f"center_norm_{kind}": name for kind, name in _KINDS.items()}
    blocks += chart(runs, "Norm of the centres", norms, limit=limit)
    return Section(id="health", title="Gradients and signs of a collapse", blocks=blocks)


def skipped_steps(run: RunRecord) -> str:
    """Over all of its processes."""
    counted = curve_of(run.metrics, "steps_skipped")
    return f"{total_of_restarting(counted.values):,}" if len(counted) else "not logged"
