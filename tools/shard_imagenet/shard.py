"""The whole job: list the source, plan the shards, have those made that are missing, and complete the folder."""

import contextlib
import importlib.metadata
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crisp.errors import CrispError
from crisp.shard_format import Manifest
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.engines import run_local, run_ray
from crisp.shard_imagenet.examine import Sample, examine
from crisp.shard_imagenet.folder import Begun, begin, complete, finished_shards, locked
from crisp.shard_imagenet.listing import Listing
from crisp.shard_imagenet.plan import Plan, plan_shards
from crisp.shard_imagenet.reading import SourceReader
from crisp.shard_imagenet.sources import list_source
from crisp.shard_imagenet.work import Job, ShardDone, ShardTask, stopped
from crisp.storage import Location

log = logging.getLogger(__name__)

_PROBES = 256  # images re-encoded beforehand, to know how large they become


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far one split is."""

    split: str
    files: int
    """Done, those of earlier runs included"""
    files_in_all: int
    """Of this run's partition"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A split before anything is written."""

    listing: Listing
    plan: Plan
    out: Location


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharded:
    """A split after the run."""

    split: str
    """'train' or 'val'; '' if the source has only one"""
    out: Location
    manifest: Manifest | None
    """None while other partitions are not done"""
    files: int
    """Read by this run; those of shards that were finished before are not"""
    elapsed_s: float
    """Of this run, after listing and planning"""
    peak_rss_bytes: int
    """Of the largest worker; 0 if nothing was made"""


def shard_imagenet(cfg: ShardConfig, *, on_progress: Callable[[Progress], None] | None = None) -> list[Sharded]:
    """Write the images of `cfg.source` as shards in `cfg.out`, one folder per split if there are two.

    The bytes of the output depend on the source and the choices alone: not on workers, engine, partitions, or how often
    the run was stopped. Shards that are finished are not made again.

    Args:
        cfg: what to do; `cfg.dry_run` is not looked at.
        on_progress: called now and then, and at the end of each split.

    Raises:
        CrispError: no source, an output that holds something else, nothing taken, a rejection under `cfg.strict`, or
            any failure to read or write. Finished shards are kept.
    """
    with _named_errors(cfg):
        return [_shard(cfg, planned, on_progress) for planned in _plan(cfg)]


def plan_only(cfg: ShardConfig) -> list[Planned]:
    """What `shard_imagenet` would do.

    Raises:
        CrispError: as `shard_imagenet`, as far as it is seen without decoding.
    """
    with _named_errors(cfg):
        return _plan(cfg)


@contextlib.contextmanager
def _named_errors(cfg: ShardConfig) -> Iterator[None]:
    """Failures of a disk or a store as one line."""
    try:
        yield
    except OSError as error:
        where, reason = error.filename or cfg.out, error.strerror or str(error)
        raise CrispError(f"{where}: {reason}; mend that and start again, finished shards are kept") from error


def _plan(cfg: ShardConfig) -> list[Planned]:
    out = Location.of(cfg.out)
    _check_apart(Location.of(cfg.source), out)
    planned = []
    # The tables are mapped, and go without their names: a run that is killed later leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix="crisp-") as tables:
        listings = list_source(cfg, Path(tables))
    for listing in listings:
        if cfg.strict and listing.rejections:
            raise stopped(cfg, listing.rejections[0])
        plan = plan_shards(listing, cfg, ratio=_ratio(cfg, listing))
        planned.append(Planned(listing=listing, plan=plan, out=out / listing.split if listing.split else out))
    return planned


def _check_apart(source: Location, out: Location) -> None:
    if source.local is not None and out.local is not None:
        inside = out.local.resolve().is_relative_to(source.local.resolve())
    else:
        inside = f"{out}/".startswith(f"{source}/")
    if inside:
        raise CrispError(f"{out}: lies in the source {source}; choose a folder outside of it")


def _ratio(cfg: ShardConfig, listing: Listing) -> float:
    """Bytes of a re-encoded image over those of its file, from some that are spread evenly over the source."""
    if cfg.short_side is None or cfg.shard_samples is not None:
        return 1.0
    numbers = np.unique(np.linspace(0, len(listing) - 1, min(_PROBES, len(listing))).astype(np.int64))
    reader = SourceReader(listing.containers)
    before = after = 0
    for entry in listing.entries(numbers):
        outcome = examine(entry, reader, cfg)
        if isinstance(outcome, Sample):
            before, after = before + entry.size, after + len(outcome.data)
    reader.close()
    return after / before if before else 1.0


def _shard(cfg: ShardConfig, planned: Planned, on_progress: Callable[[Progress], None] | None) -> Sharded:
    listing, plan, out = planned.listing, planned.plan, planned.out
    started_s = time.perf_counter()
    begun = Begun(
        shards=plan.shards,
        made_from=_made_from(cfg, listing, plan),
        classes=listing.classes,
        rejections=listing.rejections,
    )
    begin(out, begun)
    number, parts = cfg.part
    with locked(out, cfg.part):
        finished = finished_shards(out, begun)
        ours = range(number, plan.shards, parts)
        missing = [shard for shard in ours if shard not in finished]
        sizes = np.diff(plan.starts)
        total, earlier = sum(int(sizes[shard]) for shard in ours), sum(int(sizes[s]) for s in ours if s in finished)
        if earlier:
            log.info("%s: %d of %d shards are finished", out, len(ours) - len(missing), len(ours))
        peak = 0

        def done(shard: ShardDone) -> None:
            nonlocal peak
            peak = max(peak, shard.peak_rss_bytes)

        def show(files: int) -> None:
            if on_progress is not None:
                on_progress(Progress(split=listing.split, files=earlier + files, files_in_all=total))

        if missing:
            _run(
                cfg,
                Job(cfg=cfg, containers=listing.containers, out=out),
                _tasks(planned, missing),
                len(missing),
                done,
                show,
            )
        show(total - earlier)
        # Whoever finishes last finds the others' shards; two at once write the same bytes.
        is_last = parts == 1 or len(finished_shards(out, begun)) == plan.shards
        manifest = complete(out) if is_last else None
    return Sharded(
        split=listing.split,
        out=out,
        manifest=manifest,
        files=total - earlier,
        elapsed_s=time.perf_counter() - started_s,
        peak_rss_bytes=peak,
    )


def _run(
    cfg: ShardConfig,
    job: Job,
    tasks: Iterator[ShardTask],
    shards: int,
    on_done: Callable[[ShardDone], None],
    on_files: Callable[[int], None],
) -> None:
    if cfg.engine == "ray":
        run_ray(job, tasks, workers=cfg.workers, address=cfg.ray_address, on_done=on_done, on_files=on_files)
    else:
        run_local(job, tasks, shards=shards, workers=cfg.workers, on_done=on_done, on_files=on_files)


def _tasks(planned: Planned, shards: list[int]) -> Iterator[ShardTask]:
    return (ShardTask(shard, planned.listing.entries(planned.plan.numbers(shard))) for shard in shards)


def _made_from(cfg: ShardConfig, listing: Listing, plan: Plan) -> dict[str, Any]:
    """What the shards' bytes depend on. Who makes some of them later must have the same."""
    made_from: dict[str, Any] = {
        "files": len(listing),
        "source": listing.fingerprint(),
        "shards": plan.shards,
        "shard_bytes": cfg.shard_bytes if cfg.shard_samples is None else None,
        "shard_samples": cfg.shard_samples,
        "shuffle_seed": plan.seed,
        "max_pixels": cfg.max_pixels,
        "short_side": cfg.short_side,
        "orient": cfg.orient,
    }
    if cfg.short_side is not None or cfg.orient:
        codecs = ("simplejpeg", "pillow")
        made_from |= {"quality": cfg.quality} | {name: importlib.metadata.version(name) for name in codecs}
    return made_from
