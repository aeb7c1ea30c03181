"""The feature store: computed once, gone on with after any interruption, damage and full disks named."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crisp.distributed import World, world_from_environment
from crisp.errors import CrispError
from crisp.evals import store_entry
from crisp.evals.store import FeatureStore, Field, gaps
from crisp.evals.store_entry import Done
from tests.ranks import in_ranks

ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))
FIELDS = {"patches": Field((3, 2), "float32"), "labels": Field((4,), "uint8"), "size": Field((), "int64")}
KEY = {"weights": "ab12", "resolution_px": 256}
COUNT = 23


def values(items: range) -> dict[str, NDArray[Any]]:
    """Item i's values are all functions of i."""
    i = np.asarray(items)
    return {
        "patches": (i[:, None, None] + np.arange(6).reshape(3, 2) / 8).astype("float32"),
        "labels": (i[:, None] + np.arange(4)).astype("uint8"),
        "size": i**2,
    }


class Computing:
    """Counts what is asked of it, and can break off at an item."""

    def __init__(self, break_at: int | None = None, error: BaseException | None = None) -> None:
        self.asked: list[int] = []
        self._break_at, self._error = break_at, error or KeyboardInterrupt()

    def __call__(self, items: range) -> dict[str, NDArray[Any]]:
        if self._break_at in items:
            raise self._error
        self.asked += items
        return values(items)


def stored(root: Path, compute: Any = values, *, chunk: int = 5, world: World = ALONE) -> Mapping[str, NDArray[Any]]:
    return FeatureStore(root).arrays(KEY, COUNT, FIELDS, compute, chunk=chunk, world=world, title="test")


def the_folder(root: Path) -> Path:
    return FeatureStore(root).folder(KEY, COUNT, FIELDS)


def assert_right(arrays: Mapping[str, NDArray[Any]]) -> None:
    wanted = values(range(COUNT))
    assert list(arrays) == list(FIELDS)
    for name, array in arrays.items():
        assert array.dtype == np.dtype(FIELDS[name].dtype)
        np.testing.assert_array_equal(array, wanted[name])


def test_computed_once(tmp_path: Path) -> None:
    first, second = Computing(), Computing()
    arrays = stored(tmp_path, first)
    assert_right(arrays)
    assert first.asked == list(range(COUNT))
    assert_right(stored(tmp_path, second))
    assert second.asked == []
    with pytest.raises(ValueError, match="read-only"):
        arrays["size"][0] = 1


def test_another_key_has_another_folder(tmp_path: Path) -> None:
    stored(tmp_path)
    store, other = FeatureStore(tmp_path), Computing()
    for key, fields in ((KEY | {"resolution_px": 224}, FIELDS), (KEY, FIELDS | {"size": Field((), "int32")})):
        assert store.folder(key, COUNT, fields) != the_folder(tmp_path)
    assert store.folder(dict(reversed(KEY.items())), COUNT, FIELDS) == the_folder(tmp_path), "order does not matter"
    store.arrays({"else": 1}, COUNT, FIELDS, other, chunk=9, world=ALONE, title="test")
    assert len(other.asked) == COUNT
    assert json.loads((the_folder(tmp_path) / "key.json").read_text())["key"] == KEY


def test_an_interrupted_run_goes_on_with_another_chunk(tmp_path: Path) -> None:
    broken = Computing(break_at=12)
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path, broken, chunk=5)
    assert broken.asked == list(range(10))
    going_on = Computing()
    assert_right(stored(tmp_path, going_on, chunk=4))
    assert going_on.asked == list(range(10, COUNT))


def test_a_line_that_a_crash_cut_off_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path, Computing(break_at=12))
    marks = the_folder(tmp_path) / "done-0.txt"
    whole = marks.read_bytes()
    for cut in (1, 4):  # without its end, the last line still reads as numbers
        marks.write_bytes(whole[:-cut])
        going_on = Computing(break_at=20)
        with pytest.raises(KeyboardInterrupt):
            stored(tmp_path, going_on)
        assert going_on.asked[0] == 5
        assert marks.read_bytes().startswith(whole)
        marks.write_bytes(whole)
    assert_right(stored(tmp_path))


def test_a_crash_while_the_files_are_made(tmp_path: Path) -> None:
    stored(tmp_path)
    (the_folder(tmp_path) / "key.json").unlink()
    (the_folder(tmp_path) / "size.npy").write_bytes(b"")
    again = Computing()
    assert_right(stored(tmp_path, again))
    assert len(again.asked) == COUNT


def _cut_array(folder: Path) -> None:
    os.truncate(folder / "patches.npy", 300)


def _other_array(folder: Path) -> None:
    np.save(folder / "labels.npy", np.zeros((COUNT, 5), np.uint8))


def _no_array(folder: Path) -> None:
    (folder / "size.npy").unlink()


def _flipped_bit(folder: Path) -> None:
    with (folder / "patches.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def _other_key(folder: Path) -> None:
    text = (folder / "key.json").read_text()
    (folder / "key.json").write_text(text.replace("ab12", "ab13"))


def _garbage(folder: Path) -> None:
    (folder / "done-0.txt").write_text("0 5 what\n")


def _beyond(folder: Path) -> None:
    (folder / "done-0.txt").write_text(f"0 {COUNT + 1} 1 2 3\n")


def _overlap(folder: Path) -> None:
    with (folder / "done-1.txt").open("w") as file:
        file.write("0 5 1 2 3\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut_array, "patches.npy cannot be read"),
        (_other_array, "labels.npy holds uint8"),
        (_no_array, "size.npy cannot be read"),
        (_flipped_bit, "patches.npy is not as it was written in items 20–22"),
        (_other_key, "key.json describes other features"),
        (_garbage, "done-0.txt holds"),
        (_beyond, "leave its 23 items"),
        (_overlap, "overlap"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damage_is_named_with_its_remedy(tmp_path: Path, damage: Any, words: str) -> None:
    stored(tmp_path)
    damage(the_folder(tmp_path))
    with pytest.raises(CrispError, match=words) as caught:
        stored(tmp_path)
    assert str(the_folder(tmp_path)) in str(caught.value)
    assert "remove this folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(the_folder(tmp_path))
    assert_right(stored(tmp_path))


def test_a_disk_that_fills_up_loses_only_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = store_entry._write_all, []

    def full(file: int, data: NDArray[np.uint8], offset: int) -> None:
        calls.append(offset)
        if len(calls) == 8:  # in the third chunk, after one field of it
            write(file, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data, offset)

    monkeypatch.setattr(store_entry, "_write_all", full)
    with pytest.raises(CrispError, match=r"No space left on device; make room, or .*--cache") as caught:
        stored(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    going_on = Computing()
    assert_right(stored(tmp_path, going_on))
    assert going_on.asked == list(range(10, COUNT))


def test_a_disk_that_is_too_small_is_known_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 500

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    compute = Computing()
    with pytest.raises(CrispError, match=r"needs 828 B for features, 500 B are free there; make room, or .*--cache"):
        stored(tmp_path, compute)
    assert compute.asked == []
    monkeypatch.undo()
    assert_right(stored(tmp_path))


def test_bytes_are_reserved(tmp_path: Path) -> None:
    """A hole in a file would be found out only when it is written."""
    fields = {"a": Field((1 << 20,), "uint8")}
    store = FeatureStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.arrays({}, 4, fields, Computing(break_at=0), chunk=1, world=ALONE, title="test")
    status = (store.folder({}, 4, fields) / "a.npy").stat()
    assert status.st_blocks * 512 >= 4 << 20


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(CrispError, match="--cache"):
        stored(tmp_path / "cache")


def test_a_whole_entry_may_be_read_only_and_read_by_many(tmp_path: Path) -> None:
    stored(tmp_path)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in the_folder(tmp_path).iterdir())
    with store_entry.Entry(folder=the_folder(tmp_path), text="", count=1, fields={}).locked():
        assert_right(stored(tmp_path))  # although another one holds the lock
    after = sorted(
        (path.name, path.stat().st_mtime_ns) for path in the_folder(tmp_path).iterdir() if path.name != "lock"
    )
    assert after == [entry for entry in before if entry[0] != "lock"]


def test_two_processes_do_not_compute_the_same(tmp_path: Path) -> None:
    def meanwhile(items: range) -> dict[str, NDArray[Any]]:
        with pytest.raises(CrispError, match="another process is computing these features"):
            stored(tmp_path)
        return values(items)

    assert_right(stored(tmp_path, meanwhile))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_kept(tmp_path: Path, bad: float) -> None:
    def diverged(items: range) -> dict[str, NDArray[Any]]:
        chunk = values(items)
        if 7 in items:
            chunk["patches"][7 - items.start, 1, 1] = bad
        return chunk

    with pytest.raises(CrispError, match="patches of item 7 is not finite"):
        stored(tmp_path, diverged)
    going_on = Computing()
    assert_right(stored(tmp_path, going_on))
    assert going_on.asked == list(range(5, COUNT))


@pytest.mark.parametrize("spoil", ["dtype", "shape", "field"])
def test_what_was_not_announced_is_a_bug(tmp_path: Path, spoil: str) -> None:
    def wrong(items: range) -> dict[str, NDArray[Any]]:
        chunk = values(items)
        if spoil == "dtype":
            chunk["size"] = chunk["size"].astype("int32")
        elif spoil == "shape":
            chunk["size"] = chunk["size"][1:]
        else:
            del chunk["size"]
        return chunk

    with pytest.raises(ValueError, match="size"):
        stored(tmp_path, wrong)


def test_gaps() -> None:
    done = [Done(8, 10, ()), Done(2, 4, ())]
    assert gaps(done, 17, 3) == [(0, 2), (4, 7), (7, 8), (10, 13), (13, 16), (16, 17)]
    assert gaps([], 4, 9) == [(0, 4)]
    assert gaps([Done(0, 4, ())], 4, 2) == []


def _in_a_rank(root: str, break_at: int | None) -> dict[str, Any]:
    compute = Computing(break_at, CrispError("broken"))
    with world_from_environment("cpu") as world:
        try:
            arrays = stored(Path(root), compute, chunk=2, world=world)
        except (CrispError, RuntimeError) as error:  # its own, or that of a rank that waits for one that has left
            return {"asked": compute.asked, "error": type(error).__name__}
        assert_right(arrays)
    return {"asked": compute.asked, "error": None}


def test_ranks_share_the_chunks_and_another_world_goes_on(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    broken = in_ranks(_in_a_rank, 2, tmp_path / "two", str(cache), 14)
    assert {outcome["error"] for outcome in broken} <= {"CrispError", "RuntimeError"}
    computed = [item for outcome in broken for item in outcome["asked"]]
    assert len(set(computed)) == len(computed) < COUNT
    outcomes = in_ranks(_in_a_rank, 3, tmp_path / "three", str(cache), None)
    assert [outcome["error"] for outcome in outcomes] == [None] * 3
    asked = [item for outcome in outcomes for item in outcome["asked"]]
    assert sorted(computed + asked) == list(range(COUNT)), "each item once, over both runs"
    assert min(len(outcome["asked"]) for outcome in outcomes) > 0


def _damaged_for_all(root: str) -> str:
    with world_from_environment("cpu") as world, pytest.raises(CrispError) as caught:
        stored(Path(root), chunk=2, world=world)
    return str(caught.value)


def test_every_rank_hears_of_damage(tmp_path: Path) -> None:
    stored(tmp_path / "cache", chunk=2)
    _flipped_bit(the_folder(tmp_path / "cache"))
    first, second = in_ranks(_damaged_for_all, 2, tmp_path / "two", str(tmp_path / "cache"))
    assert first == second
    assert "patches.npy is not as it was written" in first
