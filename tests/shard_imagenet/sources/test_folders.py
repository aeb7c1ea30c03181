import os
from collections.abc import Callable
from pathlib import Path

import pytest

from crisp.errors import CrispError
from crisp.shard_imagenet.listing import Entry

OUT = "refused: link out of the source (--follow-links takes it)"
DOUBLE = "link within the source: what it leads to is listed by itself"


def touch(*paths: Path) -> None:
    """Each with its own content."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(path.name))


def names(lister: Callable, listing: object) -> list[str]:
    return [entry.name for entry in lister.entries(listing)]  # type: ignore[attr-defined]


def test_class_folders_by_sorted_name(tmp_path: Path, lister: Callable) -> None:
    touch(tmp_path / "b/2", tmp_path / "b/1", tmp_path / "a/deep/er/1", tmp_path / "a/1", tmp_path / "é/123")
    (tmp_path / "c").mkdir()
    listing = lister.one(tmp_path)
    assert listing.classes == ("a", "b", "c", "é")
    assert lister.entries(listing) == [
        Entry(0, "a/1", 0, 0, 0, 1),
        Entry(1, "a/deep/er/1", 0, 0, 0, 1),
        Entry(2, "b/1", 1, 0, 0, 1),
        Entry(3, "b/2", 1, 0, 0, 1),
        Entry(4, "é/123", 3, 0, 0, 3),
    ]
    assert listing.rejections == ()
    assert listing.by_class
    assert listing.split == ""


def test_names_of_any_bytes(tmp_path: Path, lister: Callable) -> None:
    """Spaces, letters beyond ASCII, line ends, bytes that are no UTF-8; equal names in different folders."""
    strange = [b"a b", "ü".encode(), b"\xff\xe9.jpg", b"x\ny", b"1"]
    for folder in (b"a", b"\xfe"):
        os.mkdir(os.path.join(os.fsencode(tmp_path), folder))
        for name in strange:
            with open(os.path.join(os.fsencode(tmp_path), folder, name), "wb") as stream:
                stream.write(folder + name)
    listing = lister.one(tmp_path)
    expected = {os.fsdecode(folder + b"/" + name): folder + name for folder in (b"a", b"\xfe") for name in strange}
    assert lister.files(listing) == expected
    assert len(listing.fingerprint()) == 64


def test_flat_folder_has_no_labels(tmp_path: Path, lister: Callable) -> None:
    touch(tmp_path / "b", tmp_path / "a c")
    listing = lister.one(tmp_path)
    assert listing.classes == ()
    assert [(e.name, e.label) for e in lister.entries(listing)] == [("a c", -1), ("b", -1)]
    assert not listing.by_class
    assert lister.files(listing) == {"a c": b"a c", "b": b"b"}


def test_what_is_no_file_is_rejected(tmp_path: Path, lister: Callable) -> None:
    touch(tmp_path / "a/1", tmp_path / "README", tmp_path / ".cache/1", tmp_path / "a/.hidden/1")
    os.mkfifo(tmp_path / "a/pipe")
    (tmp_path / "a/broken").symlink_to("nowhere")
    listing = lister.one(tmp_path)
    assert names(lister, listing) == ["a/1"]
    assert lister.rejected(listing) == {
        ".cache": "hidden folder",
        "README": "beside the class folders",
        "a/.hidden": "hidden folder",
        "a/broken": "broken link",
        "a/pipe": "not a regular file",
    }


def test_links_out_of_the_source(tmp_path: Path, lister: Callable) -> None:
    touch(tmp_path / "store/1", tmp_path / "store/deep/2", tmp_path / "subset/b/y")
    (tmp_path / "subset/a").symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "subset/b/x").symlink_to("../../store/1")
    listing = lister.one(tmp_path / "subset")
    assert names(lister, listing) == ["b/y"]
    assert lister.rejected(listing) == {"a": OUT, "b/x": OUT}
    assert listing.classes == ("b",)
    listing = lister.one(tmp_path / "subset", follow_links=True)
    assert lister.files(listing) == {"a/1": b"1", "a/deep/2": b"2", "b/x": b"1", "b/y": b"y"}
    assert listing.classes == ("a", "b")
    assert listing.rejections == ()


def test_a_source_that_is_a_link(tmp_path: Path, lister: Callable) -> None:
    touch(tmp_path / "store/a/1")
    (tmp_path / "link").symlink_to("store")
    assert lister.files(lister.one(tmp_path / "link")) == {"a/1": b"1"}


@pytest.mark.parametrize("follow_links", [False, True])
def test_links_within_the_source(tmp_path: Path, lister: Callable, follow_links: bool) -> None:
    """Doubles, unless what they lead to is hidden and so not listed itself."""
    touch(tmp_path / "a/1", tmp_path / ".blobs/2")
    (tmp_path / "alias").symlink_to("a")
    (tmp_path / "a/again").symlink_to("1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/2").symlink_to("../.blobs/2")
    (tmp_path / "c").symlink_to(".blobs")
    listing = lister.one(tmp_path, follow_links=follow_links)
    assert lister.files(listing) == {"a/1": b"1", "b/2": b"2", "c/2": b"2"}
    assert listing.classes == ("a", "b", "c")
    assert lister.rejected(listing) == {".blobs": "hidden folder", "a/again": DOUBLE, "alias": DOUBLE}


@pytest.mark.parametrize("follow_links", [False, True])
def test_link_loops_end(tmp_path: Path, lister: Callable, follow_links: bool) -> None:
    source = tmp_path / "source"
    touch(source / "a/1", tmp_path / "outside/2")
    (source / "a/self").symlink_to("self")
    (source / "a/up").symlink_to("..")
    (source / "a/here").symlink_to(".")
    (source / "a/above").symlink_to(tmp_path)
    (source / "out").symlink_to("../outside")
    (tmp_path / "outside/round").symlink_to("../source")
    (tmp_path / "outside/again").symlink_to(".")
    listing = lister.one(source, follow_links=follow_links)
    loop = "refused: link loop"
    rejected = {"a/self": loop, "a/up": loop, "a/here": loop, "a/above": loop}
    if follow_links:
        assert names(lister, listing) == ["a/1", "out/2"]
        assert lister.rejected(listing) == {**rejected, "out/round": loop, "out/again": loop}
    else:
        assert names(lister, listing) == ["a/1"]
        assert lister.rejected(listing) == {**rejected, "out": OUT}


@pytest.mark.parametrize("val_name", ["val", "validation"])
def test_splits_have_the_same_ids(tmp_path: Path, lister: Callable, val_name: str) -> None:
    touch(tmp_path / "train/a/1", tmp_path / "train/b/1", tmp_path / "train/c/1")
    touch(tmp_path / val_name / "c/2", tmp_path / val_name / "a/2", tmp_path / val_name / "d/2", tmp_path / "test/3")
    train, val = lister(tmp_path)
    assert (train.split, val.split) == ("train", "val")
    assert train.classes == val.classes == ("a", "b", "c", "d")
    assert lister.labels(train) == {"a/1": 0, "b/1": 1, "c/1": 2}
    assert lister.labels(val) == {"a/2": 0, "c/2": 2, "d/2": 3}
    assert lister.files(val) == {"a/2": b"2", "c/2": b"2", "d/2": b"2"}
    alone = lister.one(tmp_path, split="val")
    assert (alone.split, alone.classes) == ("", ("a", "c", "d"))


def test_folders_train_and_val_among_others_are_classes(tmp_path: Path, lister: Callable) -> None:
    touch(tmp_path / "train/1", tmp_path / "boat/1")
    assert lister.one(tmp_path).classes == ("boat", "train")
    with pytest.raises(CrispError, match=r"split='train': .* has no split; leave --split out"):
        lister(tmp_path, split="train")


def test_one_split_there_is_the_only_one(tmp_path: Path, lister: Callable) -> None:
    touch(tmp_path / "train/a/1")
    assert lister.one(tmp_path).split == ""
    with pytest.raises(CrispError, match=r"split='val': .* has train; leave --split out"):
        lister(tmp_path, split="val")


def test_classes_from_a_file(tmp_path: Path, lister: Callable) -> None:
    touch(tmp_path / "in/b/1", tmp_path / "in/d/1")
    (tmp_path / "classes").write_text("d\n\n a \nb\nc\n")
    listing = lister.one(tmp_path / "in", classes=str(tmp_path / "classes"))
    assert listing.classes == ("a", "b", "c", "d")
    assert lister.labels(listing) == {"b/1": 1, "d/1": 3}
    (tmp_path / "classes").write_text("a\nb\n")
    with pytest.raises(CrispError, match=r"classes: lacks d, which .*in holds; add what is missing"):
        lister(tmp_path / "in", classes=str(tmp_path / "classes"))
    (tmp_path / "classes").write_text("\n")
    with pytest.raises(CrispError, match="classes: no line in it; write one class id per line"):
        lister(tmp_path / "in", classes=str(tmp_path / "classes"))
    with pytest.raises(CrispError, match="nowhere: No such file or directory; --classes names a text file"):
        lister(tmp_path / "in", classes=str(tmp_path / "nowhere"))


def test_a_file_that_changes_after_it_was_listed(tmp_path: Path, lister: Callable) -> None:
    touch(tmp_path / "a/1")
    listing = lister.one(tmp_path)
    (tmp_path / "a/1").write_bytes(b"longer")
    with pytest.raises(OSError, match="6 bytes, but 1 when it was listed: it was changed"):
        lister.files(listing)


def test_refusals(tmp_path: Path, lister: Callable) -> None:
    touch(tmp_path / "file", tmp_path / "hidden/.git/1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes/a").mkdir(parents=True)
    for name, message in (
        ("missing", "missing: no such file or folder; give "),
        ("file", "file: a file that is neither .*; give a folder"),
        ("empty", "empty: no file in it; give "),
        ("classes", "classes: no file in it; give "),
        ("hidden", "hidden: no file in it; give "),
    ):
        with pytest.raises(CrispError, match=message):
            lister(tmp_path / name)


def test_folders_behind_a_url(lister: Callable) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("train/a/1", "train/b/deep/2", "val/b/ü 3"):
        memory.pipe_file(f"/folders-source/{name}", name.encode())
    train, val = lister("memory://folders-source/")
    assert lister.files(train) == {"a/1": b"train/a/1", "b/deep/2": b"train/b/deep/2"}
    assert lister.files(val) == {"b/ü 3": "val/b/ü 3".encode()}
    assert lister.labels(val) == {"b/ü 3": 1}
