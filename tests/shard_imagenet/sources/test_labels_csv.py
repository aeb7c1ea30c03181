from collections.abc import Callable
from pathlib import Path

import pytest

from crisp.errors import CrispError
from crisp.shard_imagenet.sources.labels_csv import CsvLabels


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    folder = tmp_path / "flat"
    folder.mkdir()
    for name in ("a.jpg", "b c.jpg", "ü.d.jpg"):
        (folder / name).write_bytes(name.encode())
    return folder


def csv(flat: Path, text: str) -> str:
    path = flat.parent / "labels.csv"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("heading", ["", "file,label\n", "ImageId,PredictionString\n", "\ufefffilename,species\n"])
@pytest.mark.parametrize("end", [".jpg", ""])
def test_class_names(flat: Path, lister: Callable, heading: str, end: str) -> None:
    where = csv(flat, f'{heading}a{end},n02\n"b c{end}",n01 1 2 3 4 n01\n\nü.d{end},n02\n')
    listing = lister.one(flat, labels=where)
    assert listing.classes == ("n01", "n02")
    assert lister.labels(listing) == {"a.jpg": 1, "b c.jpg": 0, "ü.d.jpg": 1}
    assert lister.files(listing) == {name: name.encode() for name in ("a.jpg", "b c.jpg", "ü.d.jpg")}
    assert listing.rejections == ()
    assert not listing.by_class


def test_whole_numbers_are_the_labels(flat: Path, lister: Callable, tmp_path: Path) -> None:
    where = csv(flat, "a.jpg,10\nb c.jpg,2\nü.d.jpg,0\n")
    listing = lister.one(flat, labels=where)
    assert lister.labels(listing) == {"a.jpg": 10, "b c.jpg": 2, "ü.d.jpg": 0}
    assert listing.classes == tuple(map(str, range(11)))
    names = [f"name {i}" for i in reversed(range(12))]
    (tmp_path / "classes").write_text("\n".join(names))
    listing = lister.one(flat, labels=where, classes=str(tmp_path / "classes"))
    assert listing.classes == tuple(names)  # by line: sorted, they would name other labels
    (tmp_path / "classes").write_text("a\nb\n")
    with pytest.raises(CrispError, match="classes: label 10, but 2 class names; labels count from 0"):
        lister(flat, labels=where, classes=str(tmp_path / "classes"))
    with pytest.raises(
        CrispError, match=r"labels\.csv: a has label 99999999999; labels are class names, or count from"
    ):
        lister(flat, labels=csv(flat, "a,99999999999\nb c,2\n"))


def test_both_splits_by_one_file(tmp_path: Path, lister: Callable) -> None:
    """Val has the larger label here, and train the larger name."""
    for name in ("train/1", "train/2", "val/3"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    where = csv(tmp_path / "in", "1,0\n2,1\n3,2\n")
    train, val = lister(tmp_path / "in", labels=where)
    assert train.classes == val.classes == ("0", "1", "2")
    assert (lister.labels(train), lister.labels(val)) == ({"1": 0, "2": 1}, {"3": 2})
    where = csv(tmp_path / "in", "1,c\n2,a\n3,b\n")
    train, val = lister(tmp_path / "in", labels=where)
    assert train.classes == val.classes == ("a", "b", "c")
    assert (lister.labels(train), lister.labels(val)) == ({"1": 2, "2": 0}, {"3": 1})


def test_class_folders_for_train_and_a_file_for_val(tmp_path: Path, lister: Callable) -> None:
    for name in ("train/a/1", "train/c/2", "val/3"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    train, val = lister(tmp_path / "in", labels=csv(tmp_path / "in", "3,b\n"))
    assert train.classes == val.classes == ("a", "b", "c")
    assert (lister.labels(train), lister.labels(val)) == ({"a/1": 0, "c/2": 2}, {"3": 1})
    with pytest.raises(CrispError, match=r"its labels are numbers, but .* has class folders too"):
        lister(tmp_path / "in", labels=csv(tmp_path / "in", "3,1\n"))
    with pytest.raises(CrispError, match="has class folders, which are the labels; leave --labels out"):
        lister(tmp_path / "in", labels=csv(tmp_path / "in", "3,1\n"), split="train")


def test_files_and_lines_that_have_no_counterpart(flat: Path, lister: Callable) -> None:
    where = flat / "labels.csv"  # among the images it is none
    where.write_text("a.jpg,x\ngone.jpg,x\nalso gone,y\n")
    listing = lister.one(flat, labels=str(where))
    assert lister.labels(listing) == {"a.jpg": 0}
    assert lister.rejected(listing) == {
        "b c.jpg": "no label: not in labels.csv",
        "ü.d.jpg": "no label: not in labels.csv",
        "gone.jpg": "no such file: named in labels.csv",
        "also gone": "no such file: named in labels.csv",
    }


def test_a_name_may_be_a_path(tmp_path: Path) -> None:
    labels = CsvLabels(csv(tmp_path / "x", "a/1,x\n1,y\n2.jpg,z\n"))
    assert [labels.take(name) for name in ("a/1.jpg", "1.png", "deep/2.jpg", "3")] == ["x", "y", "z", None]
    assert labels.unused == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,x\nb.jpg\n", r"labels\.csv, line 2: 'b\.jpg' has no label; a line is file,label"),
        ("a.jpg, \n", "line 1: .* has no label"),
        ("a.jpg,x\na.jpg,y\n", r"line 2: a\.jpg is y here and x before; keep one of them"),
        ("file,label\n", "no line file,label in it"),
        ("", "no line file,label in it"),
    ],
)
def test_refusals(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CrispError, match=message):
        CsvLabels(csv(tmp_path / "x", text))


def test_the_same_line_twice_is_no_contradiction(tmp_path: Path) -> None:
    assert CsvLabels(csv(tmp_path / "x", "a,x\na,x\n")).take("a") == "x"


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CrispError, match="--labels names a text file"):
        CsvLabels(str(tmp_path / "x"))
    with pytest.raises(CrispError, match="No such file or directory; --labels names a text file"):
        CsvLabels(str(tmp_path / "y"))
