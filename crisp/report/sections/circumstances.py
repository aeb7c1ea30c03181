"""Where a run ran, and what it survived there."""

from collections.abc import Sequence

from crisp.machine import Start
from crisp.report.blocks import ALL, Block, Note, Section, Table
from crisp.report.gather import RunRecord
from crisp.report.sections.training import skipped_steps

_FAILED = {
    "shard": "shard not to be had",
    "bytes": "bytes not those of the index",
    "decode": "not to be decoded",
    "render": "renderer failed",
    "timeout": "took too long",
}


def machine(runs: Sequence[RunRecord]) -> Section:
    """A column per start, equal ones of a run together."""
    blocks: list[Block] = []
    for run in runs:
        if not run.starts:
            blocks.append(Note(text=f"{run.name} has no machine.json, so its machine is not known."))
            continue
        heads: list[str] = []
        columns: list[dict[str, str]] = []

        for start in run.starts:
            facts = {
                "ranks": f"{start.ranks} on {start.nodes} node{'s' if start.nodes > 1 else ''}",
                "trains on": start.device,
                "GPUs of the first node": _counted(start.gpus),
                "processor": start.processor,
                "cores": str(start.cores),
                "memory": f"{start.memory_gb:.0f} GB",
                "system": start.system,
                **start.versions,
            }
            if columns and facts == columns[-1]:
                heads[-1] += f", {_began(start)}"
            else:
                heads.append(f"from {_began(start)}")
                columns.append(facts)
        names = list(dict.fromkeys(name for facts in columns for name in facts))
        rows = [[name, *(facts.get(name, "–") for facts in columns)] for name in names]
        blocks.append(Table(caption=run.name, heads=["", *heads], rows=rows, words=ALL))
    return Section(id="machine", title="Machine", blocks=blocks)


def _began(start: Start) -> str:
    return f"step {start.step:,} ({start.began_utc} UTC)"


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "none"


def faults(runs: Sequence[RunRecord]) -> Section:
    """Starts, checkpoints set aside, samples replaced, reports of steps that were not finite."""
    blocks: list[Block] = []
    rows = [
        [
            run.name,
            _restarts(run),
            ", ".join(f"step {step:,}" for step in run.damaged) or "none",
            _replaced(run),
            skipped_steps(run),
            str(len(run.faults.not_finite)) if run.faults.not_finite else "none",
        ]
        for run in runs
    ]
    heads = ["run", "went on from", "damaged checkpoints", "samples replaced", "steps skipped", "stops for gradients"]
    blocks.append(Table(caption="What each run survived", heads=heads, rows=rows))
    for run in runs:
        blocks += _details(run)
    return Section(id="faults", title="Faults survived", blocks=blocks)


def _restarts(run: RunRecord) -> str:
    if run.starts:
        return ", ".join(f"step {start.step:,}" for start in run.starts[1:]) or "never stopped"
    if run.event_files:
        return f"not recorded; {run.event_files - 1} times, by its TensorBoard files"
    return "not recorded"


def _replaced(run: RunRecord) -> str:
    replaced = len(run.faults.replaced)
    return f"{replaced:,} times, {run.faults.bad_samples:,} samples" if replaced else "none"


def _details(run: RunRecord) -> list[Block]:
    blocks: list[Block] = []
    if run.faults.replaced:
        kinds = ", ".join(f"{count} × {_FAILED.get(kind, kind)}" for kind, count in run.faults.kinds.most_common())
        rows = [
            [
                str(row.step),
                str(row.failed_id),
                str(row.shown_id),
                _FAILED.get(row.kind, row.kind),
                row.shard,
                row.key,
                row.reason,
            ]
            for row in run.faults.replaced
        ]
        heads = ["step", "sample", "shown instead", "failed", "shard", "key", "reason"]
        caption = f"{run.name}: {len(rows)} replacement{'s' if len(rows) > 1 else ''} ({kinds})"
        blocks.append(Table(caption=caption, heads=heads, rows=rows, words=ALL, folded=True))
    for report in run.faults.not_finite:
        bad = report.get("gradients_not_finite", [])
        blocks.append(
            Note(
                text=f"{run.name}, rank {report['rank']}: stopped at step {report.get('step', '?')} after "
                f"{report.get('skipped_in_a_row', '?')} steps in a row whose gradients were not finite "
                f"({len(bad)} tensors; loss {report.get('loss', '?')}).",
                loud=True,
            )
        )
    if run.faults.unreadable_lines:
        blocks.append(
            Note(text=f"{run.name}: {run.faults.unreadable_lines} lines or files of its faults cannot be read.")
        )
    return blocks
