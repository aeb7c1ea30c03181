"""Official layouts: what is found, what a broken copy says."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crisp.errors import CrispError
from crisp.evals.segmentation.ade20k import find_ade20k, open_ade20k
from crisp.evals.segmentation.cityscapes import CLASS_IDS, find_cityscapes, open_cityscapes
from crisp.evals.segmentation.config import SegmentationConfig
from crisp.evals.segmentation.data import SegmentationData
from crisp.evals.segmentation.folder import FolderLayout, open_folder
from crisp.evals.segmentation.layouts import open_data
from crisp.evals.segmentation.masks import read_mask
from crisp.evals.segmentation.voc2012 import find_sbd, find_voc2012, open_voc2012
from tests.evals.segmentation import tiny_data as tiny


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each data set as small as its layout can be, by name; not to be written to."""
    root = tmp_path_factory.mktemp("data")
    for name, write in WRITE.items():
        write(root / name)
    return {name: root / name for name in WRITE}


WRITE: dict[str, Callable[[Path], Path]] = {
    "ade20k": tiny.write_ade20k,
    "voc2012": tiny.write_voc2012,
    "cityscapes": tiny.write_cityscapes,
    "folder": tiny.write_folder,
}
OPEN: dict[str, Callable[[Path], SegmentationData]] = {
    "ade20k": open_ade20k,
    "voc2012": lambda root: open_voc2012(root, "train"),
    "cityscapes": open_cityscapes,
    "folder": lambda root: open_folder(root, FolderLayout()),
}
FIND = {"ade20k": find_ade20k, "voc2012": find_voc2012, "cityscapes": find_cityscapes}


@pytest.fixture
def copied(roots: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(roots[name], tmp_path / name))

    return copy


@pytest.mark.parametrize("name", WRITE)
def test_pairs_are_sorted_and_belong_together(name: str, roots: dict[str, Path]) -> None:
    data = OPEN[name](roots[name])
    for split in (data.train, data.val):
        names = [pair.name for pair in split.pairs]
        assert names == sorted(names)
        assert len(names) == {"ade20k": 75, "voc2012": 21, "cityscapes": 19, "folder": 12}[name] or split.name == "val"
        for pair in split.pairs:
            from PIL import Image

            gray = np.asarray(Image.open(pair.image))[..., 0]
            np.testing.assert_array_equal(gray, np.asarray(read_mask(pair.mask)))


def test_labels_of_each(roots: dict[str, Path]) -> None:
    ade, voc, city, folder = (OPEN[name](roots[name]).labels for name in OPEN)
    assert (ade.ignored, ade.classes) == ((0, 255), tuple(range(1, 151)))
    assert (voc.ignored, voc.classes) == ((255,), tuple(range(21)))
    assert (city.ignored, city.classes, city.known) == ((255,), tuple(range(19)), tuple(range(34)))
    assert [int(city.table[i]) for i in CLASS_IDS.values()] == list(range(19))
    assert {int(city.table[i]) for i in set(range(256)) - set(CLASS_IDS.values())} == {255}
    assert (folder.ignored, folder.classes, folder.known) == ((255,), None, tuple(range(256)))
    assert (voc.title(20), city.title(6), ade.title(7)) == ("20 (tvmonitor)", "6 (traffic light)", "7")


@pytest.mark.parametrize("name", FIND)
def test_found_from_the_folder_itself_and_from_above(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    found = FIND[name](roots[name])
    assert found is not None
    assert FIND[name](found).samefile(found)  # type: ignore[union-attr]
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "some-name").symlink_to(roots[name])
    assert FIND[name](tmp_path / "all").samefile(found)  # type: ignore[union-attr]
    others = set(WRITE) - {name}
    assert not [other for other in others if FIND[name](roots[other])]
    assert FIND[name](tmp_path / "absent") is None


@pytest.mark.parametrize("name", FIND)
def test_auto_recognises(name: str, roots: dict[str, Path]) -> None:
    config = SegmentationConfig(weights="w", data=roots[name], train_set="train")
    assert open_data(config).slug == name


def test_auto_needs_one(roots: dict[str, Path]) -> None:
    with pytest.raises(CrispError, match="no layout of ade20k, voc2012, cityscapes; name one with --dataset"):
        open_data(SegmentationConfig(weights="w", data=roots["folder"]))
    with pytest.raises(CrispError, match="holds ade20k and voc2012 and cityscapes"):
        open_data(SegmentationConfig(weights="w", data=roots["folder"].parent))
    with pytest.raises(CrispError, match="there is no such folder"):
        open_data(SegmentationConfig(weights="w", data=Path("/nowhere")))
    data = open_data(SegmentationConfig(weights="w", data=roots["folder"], dataset="folder"))
    assert data.slug == "folder"


@pytest.mark.parametrize("name", FIND)
def test_another_layout(name: str, roots: dict[str, Path]) -> None:
    with pytest.raises(CrispError, match=r"give the|into one folder"):
        OPEN[name](roots["folder"])


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ade20k", "ADEChallengeData2016/annotations/training/ADE_train_00000009.png"),
        ("ade20k", "ADEChallengeData2016/annotations/validation/ADE_val_00000002.png"),
        ("voc2012", "VOCdevkit/VOC2012/JPEGImages/2007_000004.jpg"),
        ("voc2012", "VOCdevkit/VOC2012/SegmentationClass/2008_000004.png"),
        ("cityscapes", "gtFine/val/lindau/lindau_000003_000019_gtFine_labelIds.png"),
        ("folder", "annotations/train/7.png"),
    ],
)
def test_missing_and_empty_files(name: str, file: str, copied: Callable[[str], Path]) -> None:
    root = copied(name)
    (root / file).write_bytes(b"")
    with pytest.raises(CrispError, match=rf"{file}: is empty \(1 of the \d+ files"):
        OPEN[name](root)
    (root / file).unlink()
    with pytest.raises(CrispError, match=rf"{file}: is missing \(1 of the \d+ files"):
        OPEN[name](root)


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("ade20k", "ADEChallengeData2016/images/validation", "there is no such folder"),
        ("cityscapes", "leftImg8bit/val", "there is no such folder"),
        ("voc2012", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", "there is no such list"),
        ("folder", "images/val", "there is no such folder"),
    ],
)
def test_a_missing_split(name: str, folder: str, message: str, copied: Callable[[str], Path]) -> None:
    root = copied(name)
    path = root / folder
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CrispError, match=f"{folder}: {message}"):
        OPEN[name](root)
    if not path.suffix:
        path.mkdir()
        with pytest.raises(CrispError, match="holds no image"):
            OPEN[name](root)


def test_a_short_split_is_told(roots: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    open_ade20k(roots["ade20k"])
    assert "ADE20K training: 75 images, the published split has 20210" in caplog.text
    assert "ADE20K validation: 75 images, the published split has 2000" in caplog.text


def test_fingerprint_follows_files(copied: Callable[[str], Path]) -> None:
    root = copied("folder")
    before = open_folder(root, FolderLayout())
    assert before.train.fingerprint == open_folder(root, FolderLayout()).train.fingerprint
    moved = root.rename(root.with_name("elsewhere"))
    assert open_folder(moved, FolderLayout()).train.fingerprint == before.train.fingerprint
    (moved / "images/train/0.png").write_bytes((moved / "images/train/0.png").read_bytes() + b" ")
    after = open_folder(moved, FolderLayout())
    assert after.train.fingerprint != before.train.fingerprint
    assert after.val.fingerprint == before.val.fingerprint


# --- VOC's train sets ---


@pytest.mark.parametrize("png", [False, True])
def test_trainaug_is_voc_train_and_sbd_without_voc_val(png: bool, tmp_path: Path) -> None:
    voc = tiny.write_voc2012(tmp_path)
    own = {pair.name for pair in open_voc2012(tmp_path, "train").train.pairs}
    with pytest.raises(CrispError, match=r"no masks of SBD.*--train-set train"):
        open_voc2012(tmp_path)
    masks = tiny.write_sbd(voc, tmp_path, png=png)
    data = open_voc2012(tmp_path)
    assert {pair.name for pair in data.train.pairs} == own | set(tiny.SBD_ONLY)
    assert len(data.train) == len(own) + 2
    assert data.train.official == 10_582
    assert not data.note
    for pair in data.train.pairs:
        assert pair.image.parent == voc / "JPEGImages"
        from_sbd = pair.name in tiny.SBD_ONLY
        assert pair.mask.is_relative_to(masks) == from_sbd  # VOC's own mask where there is one
        if from_sbd:
            assert (np.asarray(read_mask(pair.mask)) == 20).all()


def test_capi_is_voc_train_and_all_of_sbd_and_says_so(tmp_path: Path) -> None:
    voc = tiny.write_voc2012(tmp_path)
    masks = tiny.write_sbd(voc, tmp_path, png=False)
    data = open_voc2012(tmp_path, "capi")
    own = [pair.name for pair in open_voc2012(tmp_path, "train").train.pairs]
    sbd = [name for names in tiny.SBD_NAMES.values() for name in names]
    assert [pair.name for pair in data.train.pairs] == sorted(own + sbd)  # 2007_000000 twice, with both masks
    assert {pair.mask.parent.name for pair in data.train.pairs if pair.name == "2007_000000"} == {
        "SegmentationClass",
        "cls",
    }
    assert sum(pair.image.parent == masks / "img" for pair in data.train.pairs) == len(sbd)
    assert "2 of its 26 images are in VOC val" in data.note


def test_capi_needs_the_lists(tmp_path: Path) -> None:
    voc = tiny.write_voc2012(tmp_path)
    tiny.write_sbd(voc, tmp_path, png=True)
    with pytest.raises(CrispError, match="SegmentationClassAug: has no lists"):
        open_voc2012(tmp_path, "capi")


@pytest.mark.parametrize("png", [False, True])
def test_where_sbd_is_looked_for(png: bool, tmp_path: Path) -> None:
    voc = tiny.write_voc2012(tmp_path / "voc")
    masks = tiny.write_sbd(voc, tmp_path / "sbd", png=png)
    if png:
        masks = masks.rename(tmp_path / "sbd-masks").rename(tmp_path / "SegmentationClassAug")
    assert find_sbd(voc) is None
    for place in (masks, masks.parent):
        assert find_sbd(voc, place) == masks
        assert len(open_voc2012(voc, "trainaug", place).train) == 23
    with pytest.raises(CrispError, match="nowhere: no masks of SBD"):
        open_voc2012(voc, "trainaug", tmp_path / "nowhere")


def test_without_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voc = tiny.write_voc2012(tmp_path)
    tiny.write_sbd(voc, tmp_path, png=False)
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(CrispError, match=r"pip install crisp-ssl\[devkit\]"):
        open_voc2012(tmp_path)


def test_a_list_with_a_name_twice(tmp_path: Path) -> None:
    voc = tiny.write_voc2012(tmp_path)
    with (voc / "ImageSets/Segmentation/train.txt").open("a") as file:
        file.write("2007_000003\n")
    with pytest.raises(CrispError, match=r"train\.txt: names 2007_000003 twice"):
        open_voc2012(tmp_path, "train")


# --- any folder ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "train"}, r"folder\.images=train: \{split\} must stand in it"),
        ({"masks": "masks"}, r"folder\.masks=masks"),
        ({"val": "train"}, r"folder\.train=train: is folder\.val, too"),
        ({"ignored": (256,)}, r"folder\.ignored=256"),
        ({"classes": 1}, r"folder\.classes=1"),
    ],
)
def test_wrong_folder_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(CrispError, match=message):
        FolderLayout(**options)  # type: ignore[arg-type]


def test_folder_of_other_names(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "images" / split).rename(tmp_path / split)
        (tmp_path / "annotations" / split).rename(tmp_path / f"{split}annot")
    data = open_folder(tmp_path, FolderLayout(images="{split}", masks="{split}annot", ignored=(3,), classes=4))
    assert (len(data.train), len(data.val)) == (12, 8)
    assert (data.labels.classes, data.labels.known) == ((0, 1, 2), (0, 1, 2, 3))


def test_images_that_share_a_mask(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path)
    shutil.copy(tmp_path / "images/train/3.png", tmp_path / "images/train/3.jpg")
    with pytest.raises(CrispError, match="differ in their ending alone"):
        open_folder(tmp_path, FolderLayout())


def test_an_image_in_both_splits(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path)
    (tmp_path / "images/val/0.png").unlink()
    (tmp_path / "images/val/0.png").symlink_to(tmp_path / "images/train/0.png")
    with pytest.raises(CrispError, match=r"0\.png: is in train and in val \(1 in all\)"):
        open_folder(tmp_path, FolderLayout())
