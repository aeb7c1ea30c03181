"""`crisp shard SOURCE OUT`: progress while it runs, and a closing table."""

import json
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from crisp.shard_format import REJECTED_FILE, Manifest
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.shard import shard_imagenet
from crisp.shard_imagenet.sources import Rejection

_SHOW_EVERY_S = 0.2


def main(cfg: ShardConfig, *, console: Console | None = None) -> None:
    """Shard, show progress, rate and time left, and close with a table.

    Raises:
        CrispError: as `shard_imagenet`.
    """
    console = console or Console()
    started_s = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        refresh_per_second=2,
        expand=True,
    ) as progress:
        task = progress.add_task("listing", total=None)
        shown_s = started_s

        def show(done: int, total: int) -> None:
            nonlocal shown_s
            # Now and then: an update costs as much as a twentieth of an image, and the estimate of the rate
            # reaches back a fixed number of updates.
            if (now_s := time.perf_counter()) > shown_s + _SHOW_EVERY_S:
                shown_s = now_s
                progress.update(task, description="sharding", completed=done, total=total)

        manifest = shard_imagenet(cfg, on_progress=show)
    elapsed_s = time.perf_counter() - started_s
    console.print(Text(f"shards in {cfg.out}"), soft_wrap=True)  # a table's title would break a long path
    console.print(summary(cfg.out, manifest, elapsed_s))


def summary(out: Path, manifest: Manifest, elapsed_s: float) -> Table:
    """The closing table: samples, classes, bytes, rate, and what was rejected by kind of reason."""
    table = Table(show_header=False, min_width=40)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    files = manifest.samples + manifest.rejected
    table.add_row("samples", f"{manifest.samples:,}")
    table.add_row("classes", f"{len(manifest.classes):,}" if manifest.classes else "no labels")
    table.add_row("shards", f"{len(manifest.shards):,}")
    table.add_row("size", decimal(sum(shard.bytes for shard in manifest.shards)))
    table.add_row("rate", f"{files / elapsed_s:,.0f} files/s")
    table.add_row("rejected", f"{manifest.rejected:,}", end_section=True)
    for kind, count in _kinds(out / REJECTED_FILE).most_common():
        table.add_row(Text(f"  {kind}"), f"{count:,}")
    if manifest.rejected:
        table.caption = Text(f"each with its reason in {REJECTED_FILE}")
        table.caption_justify = "left"
    return table


def _kinds(path: Path) -> Counter[str]:
    with path.open(encoding="utf-8") as lines:
        return Counter(Rejection(**json.loads(line)).kind for line in lines)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s", style="progress.data.speed")
