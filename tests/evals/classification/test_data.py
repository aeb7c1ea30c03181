import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from crisp.errors import CrispError
from crisp.evals.classification.data import data_set_name, file_names, find_imagenet, listed, open_split, open_splits
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from tests.evals.coloured import WORDNET_IDS, class_folders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "pictures")


def sharded(root: Path, out: Path, **options: str) -> Path:
    for split in ("train", "val"):
        source, target = str(root / split), str(out / split)
        shard_imagenet(ShardConfig(source=source, out=target, workers=1, shard_samples=5, **options))  # type: ignore[arg-type]
    return out


def test_class_folders_are_read_in_the_order_of_names(root: Path) -> None:
    train, val = open_splits(root)
    assert train.classes == val.classes == WORDNET_IDS[:3]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for number in range(12):
        assert f"/{train.classes[train.labels[number]]}/" in train.source.where(number)
    assert data_set_name(train) == "pictures"


def test_shards_hold_the_same_images_labels_and_names(root: Path, tmp_path: Path) -> None:
    folders, _ = open_splits(root)
    shards, _ = open_splits(sharded(root, tmp_path / "shards"))
    assert shards.classes == folders.classes
    names = file_names(shards)
    assert sorted(names) == sorted(file_names(folders))
    assert names != sorted(names)  # mixed before they were cut into shards
    by_name = dict(zip(file_names(folders), range(12), strict=True))
    for number, name in enumerate(names):
        assert bytes(shards.source.read(number)) == bytes(folders.source.read(by_name[name]))
        assert shards.labels[number] == folders.labels[by_name[name]]


def test_a_list_picks_the_same_images_of_folders_and_shards(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "1percent.txt"
    wanted = [f"{WORDNET_IDS[2]}_1.JPEG", f"{WORDNET_IDS[0]}_3.JPEG", f"{WORDNET_IDS[1]}_0.JPEG"]
    path.write_text("\n".join(wanted) + "\n")
    for place in (root, sharded(root, tmp_path / "shards")):
        train, _ = open_splits(place)
        numbers = listed(train, path)
        assert numbers.tolist() == sorted(numbers.tolist())
        assert {file_names(train)[number] for number in numbers} == set(wanted)


def test_a_list_must_fit_the_images(root: Path, tmp_path: Path) -> None:
    train, _ = open_splits(root)
    path = tmp_path / "list.txt"

    def refused(names: list[str]) -> str:
        path.write_text("\n".join(names))
        with pytest.raises(CrispError) as raised:
            listed(train, path)
        return str(raised.value)

    each = [f"{name}_0.JPEG" for name in WORDNET_IDS[:3]]
    assert "'n9_1.JPEG' is no image of" in refused([*each, "n9_1.JPEG", "n9_2.JPEG"])
    assert "and so 2 of 5 names" in refused([*each, "n9_1.JPEG", "n9_2.JPEG"])
    assert f"{each[1]!r} stands there more than once" in refused([*each, each[1]])
    assert f"no image of class {WORDNET_IDS[2]!r}, and so for 1 classes" in refused(each[:2])
    assert "names no images" in refused([])
    with pytest.raises(CrispError, match="not a readable list of file names"):
        listed(train, tmp_path / "absent.txt")
    shutil.copy(root / "train" / WORDNET_IDS[0] / each[0], root / "train" / WORDNET_IDS[1] / each[0])
    path.write_text("\n".join(each))
    with pytest.raises(CrispError, match="names several images"):
        listed(open_split(root / "train"), path)


def test_what_is_missing_is_named_at_once(root: Path) -> None:
    for image in (root / "train" / WORDNET_IDS[1]).iterdir():
        image.unlink()
    with pytest.raises(CrispError, match=f"{WORDNET_IDS[1]}: no images, and so 1 of 3 classes"):
        open_splits(root)
    shutil.rmtree(root / "train" / WORDNET_IDS[1])
    with pytest.raises(CrispError, match=f"2 classes in train and 3 in val, '{WORDNET_IDS[1]}' is not in both"):
        open_splits(root)
    for folder in (root / "val").iterdir():
        for image in folder.iterdir():
            image.rename(root / "val" / image.name)
        folder.rmdir()
    with pytest.raises(CrispError, match="no class folders, but 6 images; sort them"):
        open_split(root / "val")
    shutil.rmtree(root / "val")
    with pytest.raises(CrispError, match="val: no such folder"):
        open_splits(root)


def test_unlabelled_and_incomplete_shards_are_refused(root: Path, tmp_path: Path) -> None:
    flat = str(root / "train" / WORDNET_IDS[0])
    shard_imagenet(ShardConfig(source=flat, out=str(tmp_path / "flat"), workers=1))
    with pytest.raises(CrispError, match="4 of 4 images have no label"):
        open_split(tmp_path / "flat")
    shards = sharded(root, tmp_path / "shards")
    next((shards / "train").glob("*.tar")).write_bytes(b"short")
    with pytest.raises(CrispError, match="5 bytes, the manifest says"):
        open_splits(shards)


def test_find_imagenet_wants_wordnet_ids(root: Path, tmp_path: Path) -> None:
    assert find_imagenet(root) == root
    assert find_imagenet(tmp_path) is None
    (tmp_path / "data").mkdir()
    shutil.copytree(root, tmp_path / "data/ILSVRC/Data/CLS-LOC")
    assert find_imagenet(tmp_path / "data") == tmp_path / "data/ILSVRC/Data/CLS-LOC"
    shards = sharded(root, tmp_path / "imagenet")
    assert find_imagenet(tmp_path) == shards
    for split in ("train", "val"):
        for folder in sorted((root / split).iterdir()):
            folder.rename(folder.with_name(f"city-{folder.name}"))
        manifest = shards / split / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "classes": ["a", "b", "c"]}))
    assert find_imagenet(root) is None
    assert find_imagenet(tmp_path) is None


def test_imagenette(test_data: Path) -> None:
    train, val = open_splits(test_data / "imagenette")
    assert find_imagenet(test_data / "imagenette") == test_data / "imagenette"
    assert len(train.classes) == 10
    assert np.bincount(train.labels).tolist() == [100] * 10
    assert np.bincount(val.labels).tolist() == [50] * 10
