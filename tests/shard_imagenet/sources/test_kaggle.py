import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from crisp.errors import CrispError

TRAIN = {"n01440764": 2, "n02119789": 1}
VAL = {"ILSVRC2012_val_00000001": "n02119789", "ILSVRC2012_val_00000002": "n01443537"}


@pytest.fixture
def images(tmp_path: Path, make_jpegs: Callable) -> dict[str, dict[str, bytes]]:
    """Kaggle's layout in tmp_path; bytes by split and name. Class n01443537 is missing from train."""
    jpegs = iter(make_jpegs(6))
    root = tmp_path / "ILSVRC/Data/CLS-LOC"
    written: dict[str, dict[str, bytes]] = {"train": {}, "val": {}, "test": {}}
    names = {
        "train": [f"{name}/{name}_{i}.JPEG" for name, count in TRAIN.items() for i in range(count)],
        "val": [f"{name}.JPEG" for name in VAL],
        "test": ["ILSVRC2012_test_00000001.JPEG"],
    }
    for split, paths in names.items():
        for path in paths:
            written[split][path] = next(jpegs)
            (root / split / path).parent.mkdir(parents=True, exist_ok=True)
            (root / split / path).write_bytes(written[split][path])
    lines = [f"{image},{label} 85 1 499 272 {label} 1 2 3 4 \n" for image, label in VAL.items()]
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(lines))
    (tmp_path / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn02119789 kit fox\n"
    )
    return written


def test_train_and_val(tmp_path: Path, images: dict, lister: Callable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train, val = lister(tmp_path)
    assert (train.split, val.split) == ("train", "val")
    assert train.layout == val.layout == "Kaggle's ImageNet"
    assert train.classes == val.classes == ("n01440764", "n01443537", "n02119789")
    assert [e.label for e in lister.entries(train)] == [0, 0, 2]
    assert [e.label for e in lister.entries(val)] == [2, 1]
    assert lister.files(train) == images["train"]
    assert lister.files(val) == images["val"]
    assert train.rejections == val.rejections == ()
    assert (train.by_class, val.by_class) == (True, False)
    assert "left out test" in caplog.text


@pytest.mark.parametrize(("split", "labels"), [("train", [0, 0, 2]), ("val", [2, 1])])
def test_one_split_has_the_ids_of_all(
    tmp_path: Path, images: dict, lister: Callable, split: str, labels: list[int]
) -> None:
    listing = lister.one(tmp_path, split=split)
    assert [e.label for e in lister.entries(listing)] == labels
    assert len(listing.classes) == 3


def test_without_the_list_of_classes_they_are_those_found(tmp_path: Path, images: dict, lister: Callable) -> None:
    (tmp_path / "LOC_synset_mapping.txt").unlink()
    assert lister(tmp_path)[0].classes == ("n01440764", "n01443537", "n02119789")
    assert lister.one(tmp_path, split="train").classes == ("n01440764", "n02119789")


def test_val_in_class_folders_needs_no_labels(tmp_path: Path, images: dict, lister: Callable) -> None:
    val = tmp_path / "ILSVRC/Data/CLS-LOC/val"
    for name, label in VAL.items():
        (val / label).mkdir()
        (val / f"{name}.JPEG").rename(val / label / f"{name}.JPEG")
    (tmp_path / "LOC_val_solution.csv").unlink()
    assert [e.label for e in lister.entries(lister(tmp_path)[1])] == [1, 2]


def test_refusals(tmp_path: Path, images: dict, lister: Callable) -> None:
    (tmp_path / "LOC_val_solution.csv").rename(tmp_path / "moved.csv")
    with pytest.raises(CrispError, match=r"LOC_val_solution\.csv: not there.*; give --labels, or take --split train"):
        lister(tmp_path)
    assert len(lister.one(tmp_path, split="train")) == 3
    assert len(lister(tmp_path, labels=str(tmp_path / "moved.csv"))[1]) == 2
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench\n")
    with pytest.raises(CrispError, match=r"LOC_synset_mapping\.txt: lacks n02119789, which"):
        lister(tmp_path, split="train")
    with pytest.raises(CrispError, match="no ILSVRC/Data/CLS-LOC in it"):
        lister(tmp_path / "ILSVRC", layout="kaggle")
