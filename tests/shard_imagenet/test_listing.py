import os
from pathlib import Path

import numpy as np
import pytest

from crisp.shard_imagenet import listing as module
from crisp.shard_imagenet.listing import ClassIds, Entry, Listing, ListingWriter, Rejection
from crisp.storage import Location

NAMES = ["a/1", "ü b/2", os.fsdecode(b"\xff"), "", "x" * 5000]


def _write(folder: Path, names: list[str] = NAMES, *, split: str = "", **changes: object) -> Listing:
    writer = ListingWriter(folder, split=split)
    container = writer.add_container("tar", Location.of("/somewhere/x.tar"))
    for i, name in enumerate(names):
        writer.add(name, label=i % 3 - 1, container=container, offset=2**40 + i, size=i)
    assert len(writer) == len(names)
    writer.reject("y", "kind: detail: more")
    arguments = {"layout": "test", "classes": ("p", "q"), "by_class": False, **changes}
    return writer.finish(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [1, 2, 65536])
def test_entries_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    listing = _write(tmp_path)
    expected = [Entry(i, name, i % 3 - 1, 0, 2**40 + i, i) for i, name in enumerate(NAMES)]
    assert len(listing) == len(NAMES)
    assert listing.entries(np.arange(len(NAMES))) == expected
    assert listing.entries(np.array([4, 0, 2])) == [expected[4], expected[0], expected[2]]
    assert all(type(value) in (int, str) for value in listing.entries(np.array([1]))[0])
    assert listing.rejections == (Rejection("y", "kind: detail: more"),)
    assert listing.rejections[0].kind == "kind"
    assert listing.containers[0].location == Location("/somewhere/x.tar")


def test_without_a_file(tmp_path: Path) -> None:
    listing = _write(tmp_path, [])
    assert len(listing) == 0
    assert listing.entries(np.arange(0)) == []
    assert len(listing.fingerprint()) == 64


@pytest.mark.parametrize("chunk", [2, 65536])
def test_labels_become_places_among_the_sorted_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    ids = ClassIds(["z"])
    assert [ids.add(name) for name in ("b", "z", "a", "b")] == [1, 0, 2, 1]
    classes, label_of = ids.sorted()
    assert classes == ("a", "b", "z")
    assert label_of[[1, 0, 2, -1]].tolist() == [1, 2, 0, -1]
    listing = _write(tmp_path, classes=classes, label_of=label_of)
    assert [entry.label for entry in listing.entries(np.arange(5))] == [-1, 2, 1, -1, 2]


def test_splits_lie_side_by_side(tmp_path: Path) -> None:
    train, val = _write(tmp_path, ["t"], split="train"), _write(tmp_path, ["v", "w"], split="val")
    assert [entry.name for entry in train.entries(np.arange(1))] == ["t"]
    assert [entry.name for entry in val.entries(np.arange(2))] == ["v", "w"]


def test_fingerprint_sees_every_change(tmp_path: Path) -> None:
    """Names, order, classes, labels, rejections; not where the source lies."""
    prints = []
    for i, (names, changes) in enumerate(
        [
            (NAMES, {}),
            (NAMES, {"layout": "not seen"}),
            (NAMES[::-1], {}),
            (["a/1ü b/2", *NAMES[1:]], {}),
            (NAMES[:-1], {}),
            (NAMES, {"classes": ("p", "r")}),
            (NAMES, {"label_of": np.array([1, 0, -1], np.int32)}),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        prints.append(_write(tmp_path / str(i), names, **changes).fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints[1:])) == len(prints) - 1


def test_a_writer_that_is_given_up_leaves_nothing_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    writers = [ListingWriter(tmp_path, split=str(i)) for i in range(20)]
    writers[0].add("x", label=0, container=0, size=1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_files_than_a_chunk(tmp_path: Path) -> None:
    """A hundred thousand in a second or so, and a table of 36 bytes for each."""
    writer = ListingWriter(tmp_path)
    container = writer.add_container("folder", Location("/x"))
    for i in range(100_000):
        writer.add(f"{i}", label=0, container=container, size=1)
    listing = writer.finish(layout="test", classes=("a",), by_class=True)
    assert [e.name for e in listing.entries(np.array([0, 65535, 65536, 99_999]))] == ["0", "65535", "65536", "99999"]
    assert (tmp_path / "files-.rows").stat().st_size == 3_600_000
