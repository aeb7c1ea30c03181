"""The state of a folder of shards: nothing yet, begun, or complete; and how it becomes complete.

Begun: `.incomplete/plan.json` says what is being made of what, and there is a record of each finished shard
(`work.py`). Complete: the manifest is there, and `.incomplete/` is gone.
"""

import contextlib
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy

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
from crisp.shard_imagenet.listing import Rejection
from crisp.shard_imagenet.work import INCOMPLETE, read_record
from crisp.shard_imagenet.writer import shard_name
from crisp.storage import Found, Location

_PLAN_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """What a folder is to become."""

    shards: int
    made_from: dict[str, Any]
    """See `Manifest.made_from`"""
    classes: tuple[str, ...]
    rejections: tuple[Rejection, ...]
    """Those of the listing"""

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "shards": self.shards,
            "made_from": self.made_from,
            "classes": self.classes,
            "rejections": self.rejections,
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Begun":
        """Inverse of `to_json`."""
        return Begun(
            shards=values["shards"],
            made_from=values["made_from"],
            classes=tuple(values["classes"]),
            rejections=tuple(Rejection(*row) for row in values["rejections"]),
        )


def read_begun(out: Location) -> Begun | None:
    """What a folder is to become, if it was begun and is not complete.

    Raises:
        CrispError: its plan cannot be read.
        OSError: as from any reading.
    """
    plan = out / INCOMPLETE / _PLAN_FILE
    if plan.size() is None:
        return None
    try:
        return Begun.from_json(json.loads(plan.read()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CrispError(f"{plan}: not a plan ({error!r}); remove {out} and shard again") from error


def read_complete(out: Location) -> Manifest | None:
    """The manifest of a folder, if it is complete.

    Raises:
        CrispError: it cannot be read.
        OSError: as from any reading.
    """
    manifest = out / MANIFEST_FILE
    return None if manifest.size() is None else parse_manifest(manifest.read(), str(manifest))


def begin(out: Location, begun: Begun) -> None:
    """Begin a folder, or go on with one that was begun or completed in the same way.

    Raises:
        CrispError: it holds something else, or shards of another source or with other choices.
        OSError: it cannot be made or listed.
    """
    out.make_folder()
    earlier = read_complete(out) or read_begun(out)
    if earlier is None:
        foreign = [found.name for found in _children(out) if found.name != INCOMPLETE]
        if foreign:
            raise CrispError(
                f"{out}: not empty ({foreign[0]}), and no {MANIFEST_FILE} in it; choose another folder, or remove this "
                f"one first"
            )
    else:
        _check_same(out, earlier.made_from, begun.made_from)
    (out / INCOMPLETE).make_folder()
    with (out / INCOMPLETE / _PLAN_FILE).whole_file() as file:
        file.write(json.dumps(begun.to_json()).encode())


def _children(out: Location) -> list[Found]:
    return out.children() if out.is_folder() else []


def _check_same(out: Location, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    different = [name for name in now if json.loads(json.dumps(now[name])) != earlier.get(name)]
    if different:
        changes = ", ".join(f"{name} was {earlier.get(name)}, is {now[name]}" for name in different)
        raise CrispError(
            f"{out}: holds shards that were made from something else ({changes}); restore that, choose another folder, "
            f"or remove this one first"
        )


@contextlib.contextmanager
def locked(out: Location, part: tuple[int, int]) -> Iterator[None]:
    """Keep a second run of the same partition out of a local folder; a killed run's lock goes with it.

    Raises:
        CrispError: another run holds it.
    """
    path = out.local
    if path is None:
        yield
        return
    with (path / INCOMPLETE / f"part-{part[0]}-of-{part[1]}.lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CrispError(
                f"{out}: another run is writing partition {part[0]}/{part[1]} of it; wait for it, or stop it first"
            ) from error
        yield


def finished_shards(out: Location, begun: Begun) -> set[int]:
    """Numbers of the shards that need not be made: whole tar and index of it, with a record or in the manifest.

    Raises:
        CrispError, OSError: as `read_complete`.
    """
    there = {found.name: found.size for found in out.children()}
    manifest = read_complete(out)
    if manifest is not None:
        infos = {_number(info.name): info for info in manifest.shards}
        finished = {
            number
            for number in range(begun.shards)
            if (info := infos.get(number)) is None  # no sample in it
            or (there.get(info.name) == info.bytes and f"{shard_name(number)}.idx" in there)
        }
    else:
        # A tar takes its name when all of it is stored, and after its record: the names tell. Without a tar, the record
        # has to be read; in a store with thousands of shards, that is not done for nothing.
        records = {_number(found.name) for found in (out / INCOMPLETE).children() if found.name.endswith(".npz")}
        tars = {number for number in records if f"{shard_name(number)}.tar" in there}
        finished = {number for number in tars if f"{shard_name(number)}.idx" in there}
        finished |= {number for number in records - tars if read_record(out, number).info is None}
    return finished


def complete(out: Location) -> Manifest:
    """Make a begun folder complete from the records of its shards, or check what was mended in a complete one.

    Raises:
        CrispError: shards are missing, or one that was made again is not what it was.
        OSError: as from any reading and writing.
    """
    manifest = read_complete(out)
    begun = read_begun(out)
    if begun is None:
        if manifest is None:
            raise CrispError(f"{out}: neither shards nor begun shards; write some with 'crisp shard SOURCE {out}'")
        return manifest
    if manifest is None:
        manifest = _merge(out, begun)
    else:
        _check_all_made(out, begun)
        _check_mended(out, manifest)
    (out / INCOMPLETE).remove_folder()
    return manifest


def _check_all_made(out: Location, begun: Begun) -> None:
    missing = sorted(set(range(begun.shards)) - finished_shards(out, begun))
    if missing:
        raise CrispError(
            f"{out}: {len(missing)} of {begun.shards} shards are not made yet (the first is {shard_name(missing[0])}); "
            f"run the partitions that are left, or 'crisp shard' again without --partition"
        )


def _merge(out: Location, begun: Begun) -> Manifest:
    _check_all_made(out, begun)
    infos: list[ShardInfo] = []
    rejections = list(begun.rejections)
    for number in range(begun.shards):
        record = read_record(out, number)
        rejections += record.rejections
        if record.info is not None:
            infos.append(record.info)
    samples = sum(info.samples for info in infos)
    if not samples:
        first = min(rejections)
        # The records stay: started again on a mended source, the run says that it was changed.
        raise CrispError(
            f"{out}: none of the {begun.made_from['files']} files could be taken ({first.source}: {first.reason}); "
            f"remove {out} and give a source of JPEG, PNG or WebP images"
        )
    with tempfile.TemporaryFile() as local:
        header = {"descr": npy.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (samples,)}
        npy.write_array_header_1_0(local, header)
        for place, info in enumerate(infos):
            rows = read_record(out, _number(info.name)).rows
            rows["shard"] = place  # among the shards there are; one without a sample leaves a gap in the names
            local.write(rows.tobytes())
        local.seek(0)
        with (out / INDEX_FILE).whole_file() as file:
            shutil.copyfileobj(local, file, 1 << 20)
        index = np.memmap(local, INDEX_DTYPE, mode="r", offset=local.tell() - samples * INDEX_DTYPE.itemsize)
        index_fingerprint = fingerprint(index)
    manifest = Manifest(
        samples=samples,
        rejected=len(rejections),
        classes=begun.classes,
        shards=tuple(infos),
        index_fingerprint=index_fingerprint,
        made_from=begun.made_from,
    )
    with (out / REJECTED_FILE).whole_file() as file:
        file.writelines(json.dumps(rejection._asdict()).encode() + b"\n" for rejection in sorted(rejections))
    with (out / MANIFEST_FILE).whole_file() as file:  # last: with it the folder is complete
        file.write(json.dumps(manifest.to_json()).encode() + b"\n")
    return manifest


def _check_mended(out: Location, manifest: Manifest) -> None:
    expected = {info.name: info for info in manifest.shards}
    for found in (out / INCOMPLETE).children():
        if not found.name.endswith(".npz"):
            continue
        info = read_record(out, _number(found.name)).info
        if info is not None and info != expected.get(info.name):
            (out / info.name).remove()
            raise CrispError(
                f"{out / info.name}: made again, it is not what it was: a file of the source has changed and "
                f"kept its size; restore it, or remove {out} and shard again"
            )


def _number(name: str) -> int:
    return int(name.removeprefix("shard-").partition(".")[0])
