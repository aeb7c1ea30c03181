"""The unit of work: one shard, from the names of its files to the tar under its final name. Engines call nothing else.

While a folder is incomplete, `.incomplete/` in it holds a record of every finished shard: its entry of the manifest,
its rows of the index, what was rejected. The record is written before the tar takes its name, so a tar under its
final name always has one.
"""

import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from crisp.errors import CrispError
from crisp.shard_format import ShardInfo
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.examine import Sample, examine
from crisp.shard_imagenet.listing import Container, Entry, Rejection
from crisp.shard_imagenet.reading import SourceReader
from crisp.shard_imagenet.writer import shard_name, write_shard
from crisp.storage import Location

INCOMPLETE = ".incomplete"

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is the same for all shards of a split."""

    cfg: ShardConfig
    containers: tuple[Container, ...]
    out: Location
    """Folder of the split's shards"""


class ShardTask(NamedTuple):
    """One shard to make."""

    number: int
    entries: list[Entry]


class ShardDone(NamedTuple):
    """A shard that was made."""

    number: int
    samples: int
    rejected: int
    peak_rss_bytes: int
    """Of the process that made it, so far"""


class Record(NamedTuple):
    """What a finished shard contributes to manifest, index and rejections."""

    info: ShardInfo | None
    """None if no sample was taken"""
    rows: NDArray[np.void]
    rejections: list[Rejection]


def make_shard(
    job: Job, task: ShardTask, reader: SourceReader, *, threads: int = 1, on_file: Callable[[], None]
) -> ShardDone:
    """Read, check, perhaps re-encode and write the files of one shard, and record it.

    Args:
        job: what is the same for all shards.
        task: the shard.
        reader: of the job's containers.
        threads: that read and decode.
        on_file: called after each file.

    Raises:
        CrispError: a rejection under `cfg.strict`; a file that cannot be read.
        OSError: a failure to write.
    """
    rejections: list[Rejection] = []

    def taken() -> Iterator[Sample]:
        with closing(_outcomes(job, task, reader, threads)) as outcomes:
            for outcome in outcomes:
                if isinstance(outcome, Sample):
                    yield outcome
                elif job.cfg.strict:
                    raise stopped(job.cfg, outcome)
                else:
                    rejections.append(outcome)
                on_file()

    info = write_shard(
        job.out,
        task.number,
        taken(),
        before_naming=lambda info, rows: write_record(job.out, task.number, Record(info, rows, rejections)),
    )
    return ShardDone(task.number, info.samples if info else 0, len(rejections), _peak_rss_bytes())


def _peak_rss_bytes() -> int:
    # getrusage would count what the process was before it became this program: a copy of the one that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _outcomes(
    job: Job, task: ShardTask, reader: SourceReader, threads: int
) -> Generator[Sample | Rejection, None, None]:
    def check(entry: Entry) -> Sample | Rejection:
        try:
            return examine(entry, reader, job.cfg)
        except OSError as error:
            where = error.filename or entry.name
            raise CrispError(
                f"{where}: {error.strerror or error}; mend that and start again, finished shards are kept"
            ) from error

    if threads == 1:
        yield from map(check, task.entries)
        return
    with ThreadPoolExecutor(threads, "examine") as pool:
        yield from _map_in_order(pool, check, task.entries, ahead=4 * threads)


def stopped(cfg: ShardConfig, rejection: Rejection) -> CrispError:
    """What `cfg.strict` raises at the first rejection."""
    return CrispError(
        f"{cfg.source}: {rejection.source}: {rejection.reason}; mend or remove it, or shard without --strict to have "
        f"such files listed and left out"
    )


# --- records --------------------------------------------------------------------------------------------------------


def _record_file(out: Location, number: int) -> Location:
    return out / INCOMPLETE / f"{shard_name(number)}.npz"


def write_record(out: Location, number: int, record: Record) -> None:
    """Write the record of a shard, whole or not at all."""
    about = {"info": record.info, "rejections": record.rejections}
    with _record_file(out, number).whole_file() as file:
        np.savez(file, rows=record.rows, about=np.frombuffer(json.dumps(about).encode(), np.uint8))


def read_record(out: Location, number: int) -> Record:
    """The record of a finished shard.

    Raises:
        OSError: there is none.
    """
    with (_record_file(out, number)).open() as file, np.load(file, allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        info = None if about["info"] is None else ShardInfo(*about["info"])
        return Record(info, arrays["rows"], [Rejection(*rejection) for rejection in about["rejections"]])


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
