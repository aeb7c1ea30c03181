"""`crisp shard SOURCE OUT`: progress while it runs, and a closing table; `crisp shard merge OUT`."""

import json
import time
from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from crisp.shard_format import REJECTED_FILE, Manifest
from crisp.shard_imagenet import shard
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.folder import complete
from crisp.shard_imagenet.listing import Rejection
from crisp.shard_imagenet.shard import Planned, Sharded, plan_only, shard_imagenet
from crisp.shard_imagenet.writer import shard_name
from crisp.storage import Location

_SHOW_EVERY_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """Complete a folder whose partitions are all done: index, rejections, manifest."""

    out: Positional[str]
    """Folder of shards, path or URL."""


def main(cfg: ShardConfig, *, console: Console | None = None) -> None:
    """Shard, show progress, rate and time left, and close with a table; or show the plan.

    Raises:
        CrispError: as `shard_imagenet`.
    """
    console = console or Console()
    if cfg.dry_run:
        for planned in plan_only(cfg):
            _print(console, f"would write {planned.out}", plan_table(planned))
        return
    with _progress(console) as bars:
        tasks = {"": bars.add_task("listing", total=None)}
        shown_s = time.perf_counter()

        def show(progress: shard.Progress) -> None:
            nonlocal shown_s
            if progress.split not in tasks:
                tasks[progress.split] = tasks.pop("") if "" in tasks else bars.add_task(progress.split, total=None)
            # Now and then: an update costs as much as a twentieth of an image, and the estimate of the rate
            # reaches back a fixed number of updates.
            if (now_s := time.perf_counter()) > shown_s + _SHOW_EVERY_S or progress.files == progress.files_in_all:
                shown_s = now_s
                bars.update(
                    tasks[progress.split],
                    description=progress.split or "sharding",
                    completed=progress.files,
                    total=progress.files_in_all,
                )

        done = shard_imagenet(cfg, on_progress=show)
    for split in done:
        if split.manifest is None:
            console.print(
                f"partition {cfg.partition} of {split.out} is done; when the others are, the last of them completes "
                f"the folder, or 'crisp shard merge {split.out}' does",
                markup=False,
                soft_wrap=True,
            )
        else:
            _print(console, f"shards in {split.out}", summary(split.out, split.manifest, split))


def merge(cfg: MergeConfig, *, console: Console | None = None) -> None:
    """Complete a folder from the records of its shards.

    Raises:
        CrispError: it was never begun, or shards are missing.
        OSError: as from any reading and writing.
    """
    out = Location.of(cfg.out)
    _print(console or Console(), f"shards in {out}", summary(out, complete(out)))


def _print(console: Console, title: str, table: Table) -> None:
    console.print(Text(title), soft_wrap=True)  # a table's title would break a long path
    console.print(table)


def summary(out: Location, manifest: Manifest, run: Sharded | None = None) -> Table:
    """The closing table: samples, classes, bytes, rate, and what was rejected by kind of reason."""
    table = _table()
    table.add_row("samples", f"{manifest.samples:,}")
    table.add_row("classes", f"{len(manifest.classes):,}" if manifest.classes else "no labels")
    table.add_row("shards", f"{len(manifest.shards):,}")
    table.add_row("size", decimal(sum(info.bytes for info in manifest.shards)))
    if run is not None:
        table.add_row("rate", f"{run.files / run.elapsed_s:,.0f} files/s" if run.files else "all was finished before")
    if run is not None and run.peak_rss_bytes:
        table.add_row("memory of a worker", decimal(run.peak_rss_bytes))
    table.add_row("rejected", f"{manifest.rejected:,}", end_section=True)
    for kind, count in _kinds(out / REJECTED_FILE).most_common():
        table.add_row(Text(f"  {kind}"), f"{count:,}")
    if manifest.rejected:
        table.caption = Text(f"each with its reason in {REJECTED_FILE}")
        table.caption_justify = "left"
    return table


def plan_table(planned: Planned) -> Table:
    """What `--dry-run` prints: sizes as far as they are known without decoding."""
    listing, plan = planned.listing, planned.plan
    table = _table()
    table.add_row("source", Text(listing.layout))
    table.add_row("files", f"{len(listing):,}")
    table.add_row("size of the files", decimal(int(listing.rows["size"].sum())))
    table.add_row("classes", f"{len(listing.classes):,}" if listing.classes else "no labels")
    table.add_row("order", "the source's" if plan.seed is None else f"shuffled, seed {plan.seed}")
    table.add_row("shards", f"{plan.shards:,}")
    table.add_row("first, last", Text(f"{shard_name(0)}, {shard_name(plan.shards - 1)}"))
    table.add_row("size of the shards, about", decimal(plan.bytes))
    table.add_row("rejected so far", f"{len(listing.rejections):,}", end_section=True)
    for kind, count in Counter(rejection.kind for rejection in listing.rejections).most_common():
        table.add_row(Text(f"  {kind}"), f"{count:,}")
    return table


def _table() -> Table:
    table = Table(show_header=False, min_width=40)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    return table


def _kinds(file: Location) -> Counter[str]:
    return Counter(Rejection(**json.loads(line)).kind for line in file.read().decode().splitlines())


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        refresh_per_second=2,
        expand=True,
    )


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s", style="progress.data.speed")
