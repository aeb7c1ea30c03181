"""`crisp shard verify OUT`: is every byte of a folder of shards what was written; if not, what is wrong, what mends it.

Each tar is read once, in pieces. Its members are followed from header to header and held against the rows of the
index; where a header is damaged, the row says where to go on. Where tar and index differ, the tar's end decides which
of them is wrong: a tar with the manifest's size and CRC-32 is whole.
"""

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.padding import Padding
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from crisp.errors import CrispError
from crisp.shard_format import (
    INDEX_DTYPE,
    INDEX_FILE,
    MANIFEST_FILE,
    REJECTED_FILE,
    Manifest,
    ShardInfo,
    fingerprint,
    parse_manifest,
)
from crisp.shard_imagenet.tar_walk import PIECE_BYTES, Faults, PieceStream, TarWalk, and_more
from crisp.shard_imagenet.work import INCOMPLETE
from crisp.storage import Location

_LOOK_EVERY_S = 0.2
_SHOWN = 50
_SHARD = re.compile(r"shard-(\d{6,})\.tar")

_AGAIN = "run the 'crisp shard' that made the folder again: only that shard is made again"
_REMOVE = f"remove it and {_AGAIN}"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Check every checksum, index and count of a folder of shards, and say what mends what is wrong."""

    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """Folder of shards, or one with such folders train and val in it; path or URL."""
    workers: int = 0
    """Shards that are read at a time; 0: the cores there are."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise CrispError(f"workers={self.workers}: must be 0 (automatic) or more")


class Problem(NamedTuple):
    """Something that is wrong in a folder of shards."""

    what: str
    """'file in the folder: how it is wrong'"""
    remedy: str


class Progress(NamedTuple):
    """How far the tars of a folder are read."""

    bytes: int = 0
    bytes_in_all: int = 0
    samples: int = 0
    """In the shards that are done"""
    shards: int = 0
    """Done"""


# --- the command ----------------------------------------------------------------------------------------------------


def main(cfg: VerifyConfig, *, console: Console | None = None) -> None:
    """Verify with progress, rate and time left; print what is wrong, and close with a table.

    Raises:
        CrispError: something is wrong, there are no shards, or they cannot be listed.
    """
    console = console or Console()
    out = Location.of(cfg.out)
    started_s = time.perf_counter()
    found: list[tuple[Location, list[Problem]]] = []
    last: dict[Location, Progress] = {}
    try:
        with _bars(console) as bars:
            for folder in _folders(out):
                task = bars.add_task("verifying" if folder == out else folder.name, total=None)

                def show(progress: Progress, folder: Location = folder, task: TaskID = task) -> None:
                    last[folder] = progress
                    bars.update(task, completed=progress.bytes, total=progress.bytes_in_all)

                found.append((folder, verify_shards(folder, workers=cfg.workers, on_progress=show)))
    except OSError as error:
        raise CrispError(f"{error.filename or out}: {error.strerror or error}; mend that and verify again") from error
    elapsed_s = time.perf_counter() - started_s
    left = _SHOWN
    for folder, problems in found:
        if problems:
            _print_problems(console, folder, problems, left)
            left = max(0, left - len(problems))
    size = sum(progress.bytes for progress in last.values())
    table = Table(show_header=False, min_width=40)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("samples", f"{sum(progress.samples for progress in last.values()):,}")
    table.add_row("shards", f"{sum(progress.shards for progress in last.values()):,}")
    table.add_row("read", decimal(size))
    table.add_row("rate", f"{decimal(int(size / elapsed_s))}/s")
    count = sum(len(problems) for _, problems in found)
    table.add_row("problems", f"{count:,}" if count else "none")
    console.print(Text(f"verified {out}"), soft_wrap=True)  # a table's title would break a long path
    console.print(table)
    if count:
        raise CrispError(f"{out}: {count:,} problem{'s'[: count > 1]}; above is what mends each")


def _folders(out: Location) -> list[Location]:
    """Those of `out`, `out/train`, `out/val` that hold shards, or what is left of some."""
    folders = [folder for folder in (out, out / "train", out / "val") if _is_folder_of_shards(folder)]
    if not folders:
        raise CrispError(f"{out}: no shards in it; write some with 'crisp shard SOURCE {out}'")
    return folders


def _is_folder_of_shards(folder: Location) -> bool:
    if (folder / MANIFEST_FILE).size() is not None:
        return True
    names = [found.name for found in folder.children()] if folder.is_folder() else []
    return INCOMPLETE in names or INDEX_FILE in names or any(map(_SHARD.fullmatch, names))


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=2,
        expand=True,
    )


def _print_problems(console: Console, folder: Location, problems: list[Problem], limit: int) -> None:
    """One line each, those with the same remedy together and above it."""

    def line(text: str, indent: int) -> None:
        if console.is_terminal:
            console.print(Padding(Text(text), (0, 0, 0, indent)))
        else:  # a line stays a line in files and pipes
            console.print(Text(" " * indent + text), soft_wrap=True)

    line(f"wrong in {folder}:", 0)
    shown = problems[:limit]
    for remedy in dict.fromkeys(problem.remedy for problem in shown):
        for problem in shown:
            if problem.remedy == remedy:
                line(problem.what, 2)
        line(f"-> {remedy}", 4)
    if len(problems) > limit:
        line(f"and {len(problems) - limit:,} more", 2)


# --- a folder -------------------------------------------------------------------------------------------------------


def verify_shards(
    folder: Location, *, workers: int = 0, on_progress: Callable[[Progress], None] | None = None
) -> list[Problem]:
    """Everything that is wrong in one folder of shards; what a tar holds is read once, in bounded memory.

    Args:
        folder: which has (or should have) a manifest.
        workers: shards that are read at a time; 0: the usable cores.
        on_progress: called now and then, and at the end.

    Raises:
        OSError: the folder cannot be listed, or its small files cannot be read.
    """
    restore = f"restore it from a copy; without one, remove {folder} and run the 'crisp shard' that made it again"
    names = {found.name for found in folder.children()} if folder.is_folder() else set()
    if (folder / MANIFEST_FILE).size() is None:
        if INCOMPLETE in names:
            remedy = f"run that 'crisp shard' again; 'crisp shard merge {folder}' if all of its partitions are done"
            return [Problem(f"{MANIFEST_FILE}: not there yet: the folder is begun, not complete", remedy)]
        return [Problem(f"{MANIFEST_FILE}: missing", restore)]
    try:
        manifest = parse_manifest((folder / MANIFEST_FILE).read(), MANIFEST_FILE)
    except CrispError as error:
        return [Problem(str(error).rpartition("; ")[0], restore)]
    if fault := _nonsense(manifest):
        return [Problem(f"{MANIFEST_FILE}: {fault}", restore)]
    problems = [*_strays(folder, names, manifest), *(Problem(f, restore) for f in _rejected(folder, manifest))]
    in_shards = sum(info.samples for info in manifest.shards)
    if in_shards != manifest.samples:
        what = f"{MANIFEST_FILE}: {manifest.samples:,} samples, but {in_shards:,} in its shards"
        problems.append(Problem(what, restore))
    with contextlib.ExitStack() as stack:
        rows: NDArray[np.void] | None = None
        try:
            rows = _open_index(folder / INDEX_FILE, in_shards, stack)
        except _IndexFaultError as error:
            problems.append(Problem(f"{INDEX_FILE}: {error}", restore))
        checks = _Checks(folder, manifest, rows)
        problems += checks.run(workers or len(os.sched_getaffinity(0)), on_progress or (lambda progress: None))
        if rows is not None:
            if faults := [checks.row_faults[place] for place in sorted(checks.row_faults)]:
                what = faults[0].first + and_more(sum(fault.count for fault in faults) - 1)
                problems.append(Problem(f"{INDEX_FILE}: {what}", restore))
            elif fingerprint(rows) != manifest.index_fingerprint:
                problems.append(Problem(f"{INDEX_FILE}: its fingerprint is not the manifest's", restore))
        if doubles := _doubles(checks.keys):
            what = f"sample {doubles[0]:09d}: more than one has this key{and_more(len(doubles) - 1)}"
            problems.append(Problem(what, f"remove {folder} and run the 'crisp shard' that made it again"))
    return problems


def _nonsense(manifest: Manifest) -> str | None:
    """What no run has written."""
    numbers = [manifest.samples, manifest.rejected]
    for info in manifest.shards:
        numbers += info[1:]
    if not all(type(number) is int and number >= 0 for number in numbers):
        return "a count, size or checksum in it is not a number"
    matches = [_SHARD.fullmatch(info.name) if isinstance(info.name, str) else None for info in manifest.shards]
    order = [int(match[1]) for match in matches if match]
    if len(order) < len(matches) or any(np.diff(order) <= 0):
        return "the names of its shards are not those of shards in order"
    planned = manifest.made_from.get("shards") if isinstance(manifest.made_from, dict) else None
    if not isinstance(planned, int) or any(number >= planned for number in order):
        return f"a shard in it is not one of those that were planned ({planned})"
    if not all(isinstance(name, str) for name in manifest.classes):
        return "a class in it has no name"
    if len(set(manifest.classes)) < len(manifest.classes):
        return "two of its classes have the same name"
    return None


def _strays(folder: Location, names: set[str], manifest: Manifest) -> Iterator[Problem]:
    known = {name for info in manifest.shards for name in (info.name, _idx(info))}
    for name in sorted(names):
        if name == INCOMPLETE:
            what = "a run that mends the folder is begun, not complete"
            yield Problem(f"{name}: {what}", "run that 'crisp shard' again")
        elif name.endswith(".partial"):
            yield Problem(f"{name}: left by a run that was stopped", "remove it, unless a run is writing it now")
        elif name.endswith((".tar", ".idx")) and name not in known:
            yield Problem(f"{name}: not in the manifest", "remove it")


def _rejected(folder: Location, manifest: Manifest) -> Iterator[str]:
    if (folder / REJECTED_FILE).size() is None:
        yield f"{REJECTED_FILE}: missing"
        return
    lines = (folder / REJECTED_FILE).read().splitlines()
    if len(lines) != manifest.rejected:
        yield f"{REJECTED_FILE}: {len(lines):,} lines, the manifest says {manifest.rejected:,} were rejected"
    for number, line in enumerate(lines, 1):
        try:
            if {"source", "reason"} == json.loads(line).keys():
                continue
        except (ValueError, AttributeError):  # not JSON, or not an object
            pass
        yield f"{REJECTED_FILE}: line {number} is not a source with a reason"
        return


class _IndexFaultError(Exception):
    """The index cannot be used."""


def _open_index(file: Location, samples: int, stack: contextlib.ExitStack) -> NDArray[np.void]:
    """The rows, memory-mapped; those of a store from a temporary file."""
    header = io.BytesIO()
    npy.write_array_header_1_0(
        header, {"descr": npy.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (samples,)}
    )
    size, expected = file.size(), len(header.getvalue()) + samples * INDEX_DTYPE.itemsize
    if size is None:
        raise _IndexFaultError("missing")
    if size != expected:
        raise _IndexFaultError(f"{size:,} bytes, where {samples:,} samples take {expected:,}")
    if file.read(0, len(header.getvalue())) != header.getvalue():
        raise _IndexFaultError(f"its header is not that of {samples:,} rows of {INDEX_DTYPE.itemsize} bytes")
    path = file.local
    if path is None:
        copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crisp-"))) / INDEX_FILE
        with file.open() as stream, copy.open("wb") as local:
            shutil.copyfileobj(stream, local, PIECE_BYTES)
        path = copy
    return np.memmap(path, INDEX_DTYPE, mode="r", offset=len(header.getvalue()), shape=(samples,))


def _doubles(keys: NDArray[np.int64]) -> list[int]:
    keys.sort()
    return [int(key) for key in np.unique(keys[1:][keys[1:] == keys[:-1]]) if key >= 0]


def _idx(info: ShardInfo) -> str:
    return info.name.removesuffix(".tar") + ".idx"


class _StopError(Exception):
    """The main thread has given up."""


class _Checks:
    """All shards of a folder, in threads: reading and CRC-32 leave the interpreter to the others."""

    def __init__(self, folder: Location, manifest: Manifest, rows: NDArray[np.void] | None) -> None:
        self._folder, self._manifest, self._rows = folder, manifest, rows
        self._starts = np.cumsum([0, *(info.samples for info in manifest.shards)])
        self.keys = np.full(self._starts[-1] if rows is not None else 0, -1, np.int64)
        """Of the samples in whole tars; -1: not known"""
        self.row_faults: dict[int, Faults] = {}
        """What the index says and whole tars do not, by place of the shard"""
        self._lock, self._stop, self._bytes = threading.Lock(), threading.Event(), 0

    def run(self, workers: int, on_progress: Callable[[Progress], None]) -> list[Problem]:
        """Check all; problems in the order of the shards."""
        infos = self._manifest.shards
        in_all = sum(info.bytes for info in infos)
        pool = ThreadPoolExecutor(workers, "verify")
        try:
            futures = [pool.submit(self._shard, place) for place in range(len(infos))]
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, timeout=_LOOK_EVERY_S)
                for future in ended:
                    future.result()  # what cannot happen stops the others, too
                done = [info for info, future in zip(infos, futures, strict=True) if future not in waiting]
                on_progress(Progress(self._bytes, in_all, sum(info.samples for info in done), len(done)))
            return [problem for future in futures for problem in future.result()]
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _count(self, size: int) -> None:
        if self._stop.is_set():
            raise _StopError
        with self._lock:
            self._bytes += size

    def _shard(self, place: int) -> list[Problem]:
        info = self._manifest.shards[place]
        try:
            return self._check(place, info)
        except OSError as error:
            what = f"{info.name}: cannot be read ({error.strerror or error})"
            return [Problem(what, f"mend that and verify again; if it cannot be mended, {_REMOVE}")]

    def _check(self, place: int, info: ShardInfo) -> list[Problem]:
        size = (self._folder / info.name).size()
        if size is None:
            return [Problem(f"{info.name}: missing", _AGAIN)]
        start, end = self._starts[place], self._starts[place + 1]
        with (self._folder / info.name).open() as file:
            stream = PieceStream(file, size, self._count)
            walk = TarWalk(stream)
            if self._rows is not None:
                walk.run(self._rows[start:end], int(start))
            stream.drain()
        if size != info.bytes or stream.checksum != info.checksum:
            return [_damaged(info, size, walk)]
        if walk.broken.count:
            what = f"{info.name}: not as crisp writes it, though its CRC-32 is the manifest's: {walk.broken}"
            return [Problem(what, f"remove {self._folder} and run the 'crisp shard' that made it again")]
        if self._rows is not None:
            self.keys[start:end] = walk.keys
            self._check_rows(place, info, walk)
        return self._check_idx(info, walk)

    def _check_rows(self, place: int, info: ShardInfo, walk: TarWalk) -> None:
        """What only the index can be wrong about, as the tar is whole."""
        assert self._rows is not None
        start = self._starts[place]
        rows = self._rows[start : self._starts[place + 1]]
        faults, classes = walk.differences, len(self._manifest.classes)
        for row in np.flatnonzero(rows["shard"] != place).tolist():
            faults.add(f"row {start + row}: shard {rows['shard'][row]}, but it is in {info.name}, number {place}")
        if not faults.count:
            for row in np.flatnonzero((rows["label"] < -1) | (rows["label"] >= classes)).tolist():
                faults.add(f"row {start + row}: label {rows['label'][row]}, of {classes} classes")
        if faults.count:
            self.row_faults[place] = faults

    def _check_idx(self, info: ShardInfo, walk: TarWalk) -> list[Problem]:
        idx = self._folder / _idx(info)
        if idx.size() is None:
            return [Problem(f"{idx.name}: missing", _AGAIN)]
        if self._rows is None:
            return []
        checksum = size = 0
        with idx.open() as file:
            while piece := file.read(PIECE_BYTES):
                checksum, size = zlib.crc32(piece, checksum), size + len(piece)
        if (size, checksum) != (walk.idx_size, walk.idx_checksum):
            return [Problem(f"{idx.name}: not the index of {info.name}", _REMOVE)]
        return []


def _damaged(info: ShardInfo, size: int, walk: TarWalk) -> Problem:
    sign = f"{size:,} bytes in place of {info.bytes:,}" if size != info.bytes else ""
    if walk.places.count:
        return Problem(f"{info.name}: {sign or 'damaged'}: {walk.places}", _REMOVE)
    # Then the damage is in the name of a source.
    sign = sign or "its CRC-32 is not the manifest's"
    what = f"{info.name}: {sign}, though images, labels and headers in it are right"
    return Problem(what, _REMOVE)
