"""`crisp ablate`: plan, run, table."""

import logging
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.text import Text

from crisp.ablate.config import AblateConfig
from crisp.ablate.evaluations import RowEvaluation, evaluations_for
from crisp.ablate.paper import TITLES
from crisp.ablate.rows import Row, demo_data, expected_hours, plan_rows
from crisp.ablate.runner import Failure, Job, Slot, Stage, run_jobs
from crisp.ablate.table import make_table, table_lines, write_table
from crisp.errors import CrispError
from crisp.evals.tables import markdown_table
from crisp.progress import describe_time
from crisp.viz.ablation_table import draw_ablation, read_table
from crisp.viz.figure import new_figure, save_png

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Parse and run.

    Raises:
        CrispError: what cannot work, before anything runs; or, at the end, rows that failed.
    """
    ablate(tyro.cli(AblateConfig, args=args, prog="crisp ablate"))


def ablate(config: AblateConfig) -> Path:
    """Train and evaluate what is not done yet, then write OUT/TABLE/table.md, table.json, curve.json and curve.png.

    Returns:
        table.md.

    Raises:
        CrispError: what cannot work, before anything runs; or, after the table was written, rows that failed.
    """
    began_s = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    rows = plan_rows(config)
    new_figure(1, 1)  # what is missing for the curve is said now
    evaluations = evaluations_for(config)
    slots = find_slots(config)
    _print_plan(config, rows, evaluations, slots, console)
    if config.dry_run:
        _print_commands(rows, evaluations, slots[0], console)
        return config.folder / "table.md"
    if config.scale == "demo" and config.shards is None:
        write_demo_data(config, console)
    _check_shards(rows[0])
    failures = run_jobs([_job(row, evaluations, config) for row in rows], slots)
    return _finish(config, rows, evaluations, failures, console, elapsed_s=time.monotonic() - began_s)


def _finish(
    config: AblateConfig,
    rows: Sequence[Row],
    evaluations: Sequence[RowEvaluation],
    failures: dict[str, Failure],
    console: Console,
    *,
    elapsed_s: float,
) -> Path:
    table = make_table(config, rows, evaluations, failures)
    path = write_table(table, config.folder)
    measured = any(row.ours for row in table.rows)
    if measured:
        save_png(draw_ablation(read_table(config.folder / "curve.json")), config.folder / "curve.png")
    console.print(Text(f"\n{table.title}, percent\n\n{markdown_table(*table_lines(table))}"))
    for note in table.notes:
        console.print(Text(note))
    console.print(
        Text(f"\n{path}, table.json, curve.json{', curve.png' if measured else ''}: {describe_time(elapsed_s)}")
    )
    if failures:
        first = next(iter(failures.values()))
        more = f" (and {len(failures) - 1} more of {len(rows)} rows)" if len(failures) > 1 else ""
        raise CrispError(f"{first}{more}; the same command takes them up again")
    return path


def find_slots(config: AblateConfig) -> list[Slot]:
    """What rows are trained on: groups of GPUs, or the CPU for one row at a time.

    Raises:
        CrispError: GPUs asked for where there are none, or fewer than one row wants.
    """
    import torch

    count = torch.cuda.device_count() if config.device != "cpu" else 0
    if count == 0:
        if config.device == "cuda":
            raise CrispError("device=cuda: no GPU is visible to PyTorch; take --device cpu, or check with nvidia-smi")
        if config.gpus_per_row > 1:
            raise CrispError(f"gpus_per_row={config.gpus_per_row}: there is no GPU here; leave it out")
        return [Slot(name="CPU")]
    # Those that this process may use, by the names that it was given.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpu_slots(visible.split(",") if visible else [str(i) for i in range(count)], config.gpus_per_row)


def gpu_slots(gpus: Sequence[str], each: int) -> list[Slot]:
    """Groups of `each` GPUs; those that are left over stay idle. They share the cores for their loaders.

    Raises:
        CrispError: there are fewer than `each`.
    """
    if len(gpus) < each:
        raise CrispError(f"gpus_per_row={each}: there are {len(gpus)} GPUs here; give a smaller number")
    groups = [gpus[start : start + each] for start in range(0, len(gpus) - each + 1, each)]
    threads = max(1, len(os.sched_getaffinity(0)) // (len(groups) * each))
    options = ("--data.threads", str(threads)) if len(groups) > 1 else ()
    return [
        Slot(name=f"GPU {','.join(group)}", environment={"CUDA_VISIBLE_DEVICES": ",".join(group)}, options=options)
        for group in groups
    ]


def _job(row: Row, evaluations: Sequence[RowEvaluation], config: AblateConfig) -> Job:
    given = {option.partition("=")[0] for option in config.train}

    def train(slot: Slot) -> list[str]:
        options = () if "data.threads" in given else slot.options
        return row.train_command(gpus=config.gpus_per_row, extra=options)

    stages = [Stage(name="training", command=train, done=lambda: row.state() == "complete")]
    stages += [_evaluation_stage(row, evaluation) for evaluation in evaluations if evaluation.command is not None]
    return Job(name=row.name, log=row.log, stages=stages)


def _evaluation_stage(row: Row, evaluation: RowEvaluation) -> Stage:
    command = evaluation.command
    assert command is not None
    return Stage(name=evaluation.name, command=lambda slot: command(row), done=lambda: evaluation.done(row))


def _check_shards(row: Row) -> None:
    """Open them once, so that what is wrong with them is said in one line, and not by every row's log."""
    from crisp.pipelines.loader import open_shard_set

    open_shard_set(row.config)


def write_demo_data(config: AblateConfig, console: Console) -> None:
    """The demo's photographs as shards of both splits, once for all tables."""
    from crisp.demo_images import write_demo_images
    from crisp.shard_format import MANIFEST_FILE
    from crisp.shard_imagenet.command import main as shard
    from crisp.shard_imagenet.config import ShardConfig

    folder = demo_data(config)
    splits = ("train", "test")
    if all((folder / "shards" / split / MANIFEST_FILE).exists() for split in splits):
        return
    write_demo_images(folder / "images", seed=0)
    for split in splits:
        shard(ShardConfig(source=str(folder / "images" / split), out=str(folder / "shards" / split)), console=console)


def _print_plan(
    config: AblateConfig,
    rows: Sequence[Row],
    evaluations: Sequence[RowEvaluation],
    slots: Sequence[Slot],
    console: Console,
) -> None:
    console.print(Text(f"{TITLES[config.table]}, scale {config.scale}, in {config.folder}\n"))
    lines = []
    for row in rows:
        change = ", ".join(f"{field} = {value}" for field, value in row.change.items()) or "the default"
        lines.append([row.name, change, row.state(), _time(expected_hours(row, scale=config.scale))])
    console.print(Text(markdown_table(["row", "change", "state", "training"], lines)))
    total = sum(expected_hours(row, scale=config.scale) for row in rows)
    if config.scale == "paper":
        console.print(
            Text(
                f"Expected: {_time(total)} of four RTX 3090 for all of them by the paper's 49 minutes per epoch, "
                f"that is {4 * total:.0f} GPU hours; evaluations come on top."
            )
        )
    else:
        console.print(Text(f"Expected: {_time(total)} on two cores that do nothing else; evaluations come on top."))
    scored = ", ".join(evaluation.name for evaluation in evaluations)
    console.print(
        Text(f"Evaluated by: {scored}. On {', '.join(slot.name for slot in slots)}, one row each at a time.\n")
    )


def _time(hours: float) -> str:
    if hours == 0:
        return "–"
    return f"{hours:.0f} h" if hours >= 2 else f"{60 * hours:.1f} min"


def _print_commands(rows: Sequence[Row], evaluations: Sequence[RowEvaluation], slot: Slot, console: Console) -> None:
    environment = "".join(f"{name}={value} " for name, value in slot.environment.items())
    for row in rows:
        console.print(Text(f"# {row.name}"))
        gpus = len(slot.environment.get("CUDA_VISIBLE_DEVICES", "0").split(","))
        commands = [] if row.state() == "complete" else [row.train_command(gpus=gpus, extra=slot.options)]
        commands += [e.command(row) for e in evaluations if e.command is not None and not e.done(row)]
        for command in commands:
            console.print(Text(environment + shlex.join(command)))
