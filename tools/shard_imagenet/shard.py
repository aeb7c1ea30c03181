"""The whole job: list, examine in threads, write in order, then index, rejections and, last, the manifest."""

import contextlib
import functools
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.shard_format import INDEX_DTYPE, INDEX_FILE, MANIFEST_FILE, REJECTED_FILE, Manifest, ShardInfo, fingerprint
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.examine import Sample, examine
from crisp.shard_imagenet.sources import Rejection, Source, list_source
from crisp.shard_imagenet.writer import plan_shards, whole_file, write_shard

_T = TypeVar("_T")
_R = TypeVar("_R")


def shard_imagenet(cfg: ShardConfig, *, on_progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Write the images of `cfg.source` as shards in `cfg.out`; the output's bytes do not depend on `cfg.workers`.

    Threads, not processes, decode: decoding releases the interpreter lock, and the bytes need not be copied between
    processes. The one thread that writes takes about 3500 samples of 110 kB a second.

    Args:
        cfg: what to do.
        on_progress: called with (files done, files in all) after each file.

    Raises:
        CrispError: no source, an output that is not empty, nothing taken, a rejection under `cfg.strict`, or any
            failure to list or write. What was written so far is then removed.
    """
    try:
        _check_out(cfg)
        source = list_source(cfg.source)
        cfg.out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            undo.callback(_remove_all, cfg.out)  # it was empty: all in it is ours
            manifest = _shard(cfg, source, on_progress)
            undo.pop_all()
        return manifest
    except OSError as error:
        reason = error.strerror or str(error)
        raise CrispError(f"{error.filename or cfg.out}: {reason}; mend that and shard again") from error


def _check_out(cfg: ShardConfig) -> None:
    out = cfg.out
    if out.resolve().is_relative_to(cfg.source.resolve()):
        raise CrispError(f"{out}: lies in the source {cfg.source}; choose a folder outside of it")
    if (out / MANIFEST_FILE).exists():
        raise CrispError(f"{out}: holds shards already; choose another folder, or remove this one first")
    if out.is_dir() and any(out.iterdir()):
        raise CrispError(
            f"{out}: not empty, and no {MANIFEST_FILE} in it (something else, or a run that was killed); "
            f"choose another folder, or remove this one first"
        )


def _shard(cfg: ShardConfig, source: Source, on_progress: Callable[[int, int], None] | None) -> Manifest:
    rejections = list(source.rejections)
    if cfg.strict and rejections:
        raise _stopped(cfg, rejections[0])
    shards: list[ShardInfo] = []
    rows = [np.empty(0, INDEX_DTYPE)]
    workers = cfg.workers or len(os.sched_getaffinity(0))
    check = functools.partial(examine, cfg.source, max_pixels=cfg.max_pixels)
    with (
        ThreadPoolExecutor(workers, "examine") as pool,
        contextlib.closing(_map_in_order(pool, check, source.files, ahead=4 * workers)) as outcomes,
    ):
        done = 0

        def taken(count: int) -> Iterator[Sample]:
            nonlocal done
            for outcome in islice(outcomes, count):
                done += 1
                if isinstance(outcome, Sample):
                    yield outcome
                elif cfg.strict:
                    raise _stopped(cfg, outcome)
                else:
                    rejections.append(outcome)
                if on_progress is not None:
                    on_progress(done, len(source.files))

        for count in plan_shards((file.size for file in source.files), cfg.shard_bytes):
            written = write_shard(cfg.out, len(shards), taken(count))
            if written is not None:
                shards.append(written[0])
                rows.append(written[1])
    if not shards:
        first = min(rejections)
        raise CrispError(
            f"{cfg.source}: none of its {len(source.files)} files could be taken ({first.source}: {first.reason}); "
            f"give a folder of JPEG, PNG or WebP images"
        )
    return _finish(cfg.out, source, shards, np.concatenate(rows), sorted(rejections))


def _finish(
    out: Path, source: Source, shards: list[ShardInfo], index: NDArray[np.void], rejections: list[Rejection]
) -> Manifest:
    manifest = Manifest(
        samples=len(index),
        rejected=len(rejections),
        classes=source.classes,
        shards=tuple(shards),
        index_fingerprint=fingerprint(index),
    )
    with whole_file(out / INDEX_FILE) as stream:
        np.save(stream, index)
    with whole_file(out / REJECTED_FILE) as stream:
        stream.writelines(json.dumps(rejection._asdict()).encode() + b"\n" for rejection in rejections)
    with whole_file(out / MANIFEST_FILE) as stream:  # last: with it the folder is complete
        stream.write(json.dumps(manifest.to_json(), indent=1).encode() + b"\n")
    return manifest


def _stopped(cfg: ShardConfig, rejection: Rejection) -> CrispError:
    return CrispError(
        f"{cfg.source / rejection.source}: {rejection.reason}; mend or remove it, or shard without --strict to have "
        f"such files listed and left out"
    )


def _remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[_T], _R], items: Iterable[_T], *, ahead: int
) -> Generator[_R, None, None]:
    """Results in the order of `items`, with at most `ahead` of them waiting in memory."""
    pending: deque[Future[_R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
