import io
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crisp.errors import CrispError

CLASSES = ("n00000007", "n01440764", "n02119789")


@pytest.fixture
def images(make_jpegs: Callable) -> dict[str, bytes]:
    """By name as in class folders, not in order."""
    jpegs = make_jpegs(9)
    return {f"{CLASSES[i % 3]}/{CLASSES[i % 3]}_{10 - i}.JPEG": jpegs[i] for i in range(9)}


@pytest.fixture
def train_tar(images: dict[str, bytes], make_tar: Callable) -> bytes:
    """The classes not in order, either."""
    return make_tar(
        (
            f"{wordnet_id}.tar",
            make_tar((n.split("/")[1], data) for n, data in images.items() if n.startswith(wordnet_id)),
        )
        for wordnet_id in reversed(CLASSES)
    )


@pytest.fixture
def val_images(make_jpegs: Callable) -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i + 1:08d}.JPEG": data for i, data in enumerate(make_jpegs(5))}


@pytest.fixture
def val_tar(val_images: dict[str, bytes], make_tar: Callable) -> bytes:
    return make_tar(reversed(val_images.items()))


VAL_IDS = [1, 2, 0, 2, 1]  # places in CLASSES
VAL_TEXT = "".join(f"{CLASSES[i]}\n" for i in VAL_IDS)


def devkit() -> bytes:
    """With meta.mat's struct as in the official one: leaves first, ids not in order of the WordNet ids."""
    savemat = pytest.importorskip("scipy.io").savemat
    rows = [  # ILSVRC2012_ID, WNID, words, gloss, num_children, children, wordnet_height, num_train_images
        (1, "n02119789", "kit fox", "small", 0, [], 0, 1300),
        (2, "n01440764", "tench", "fish", 0, [], 0, 1300),
        (3, "n09999999", "never seen", "", 0, [], 0, 1300),
        (4, "n00000007", "first", "", 0, [], 0, 1300),
        (5, "n00001740", "entity", "", 2, [1, 2], 3, 0),
    ]
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss"]
    names += ["num_children", "children", "wordnet_height", "num_train_images"]
    synsets = np.zeros((len(rows), 1), [(name, object) for name in names])
    for i, row in enumerate(rows):
        synsets[i, 0] = tuple(np.array([[x]], np.uint16) if isinstance(x, int) else x for x in row)
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    truth = "".join(f"{[4, 2, 1][i]}\n" for i in VAL_IDS).encode()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in (
            ("readme.txt", b"?"),
            ("data/meta.mat", mat.getvalue()),
            ("data/ILSVRC2012_validation_ground_truth.txt", truth),
        ):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_train_is_listed_as_the_class_folders_it_would_unpack_to(
    tmp_path: Path, lister: Callable, images: dict, train_tar: bytes
) -> None:
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(train_tar)
    for name, data in images.items():
        (tmp_path / "unpacked" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "unpacked" / name).write_bytes(data)
    listing = lister.one(tmp_path / "ILSVRC2012_img_train.tar")
    assert lister.files(listing) == images
    tables = lister.entries(listing), listing.classes
    folders = lister.one(tmp_path / "unpacked")
    assert tables[1] == folders.classes == CLASSES
    assert [e._replace(offset=0) for e in tables[0]] == lister.entries(folders)
    assert [c.kind for c in listing.containers] == ["tar"]
    assert listing.by_class
    assert listing.rejections == ()


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_of_class_tars_or_a_class_tar(
    tmp_path: Path, lister: Callable, images: dict, train_tar: bytes, whole: bool
) -> None:
    with tarfile.open(fileobj=io.BytesIO(train_tar)) as tar:
        tar.extractall(tmp_path, filter="data")
    source = tmp_path if whole else tmp_path / f"{CLASSES[1]}.tar"
    listing = lister.one(source)
    assert lister.files(listing) == {n: d for n, d in images.items() if whole or n.startswith(CLASSES[1])}
    assert listing.classes == (CLASSES if whole else CLASSES[1:2])


def test_train_by_any_name(tmp_path: Path, lister: Callable, images: dict, train_tar: bytes) -> None:
    (tmp_path / "t.tar").write_bytes(train_tar)
    assert lister.files(lister.one(tmp_path / "t.tar")) == images
    assert lister.files(lister.one(tmp_path, layout="imagenet-tars")) == images


def test_val_with_a_text_file(
    tmp_path: Path, lister: Callable, val_images: dict, val_tar: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(val_tar)
    (tmp_path / "labels").write_text(VAL_TEXT + "\n")
    listing = lister.one(tmp_path / "ILSVRC2012_img_val.tar", labels=str(tmp_path / "labels"))
    assert lister.files(listing) == val_images
    assert [e.label for e in lister.entries(listing)] == VAL_IDS
    assert listing.classes == CLASSES
    assert not listing.by_class
    (tmp_path / "labels").rename(tmp_path / "imagenet_2012_validation_synset_labels.txt")
    with caplog.at_level(logging.INFO):
        for source in (tmp_path, tmp_path / "ILSVRC2012_img_val.tar"):
            assert [e.label for e in lister.entries(lister.one(source))] == VAL_IDS
    assert "imagenet_2012_validation_synset_labels.txt: labels of val" in caplog.text


def test_val_with_the_devkit_has_all_its_classes(
    tmp_path: Path, lister: Callable, val_images: dict, val_tar: bytes
) -> None:
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(val_tar)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    for choices in ({}, {"labels": str(tmp_path / "ILSVRC2012_devkit_t12.tar.gz")}):
        listing = lister.one(tmp_path, **choices)
        assert listing.classes == (*CLASSES, "n09999999")
        assert [e.label for e in lister.entries(listing)] == VAL_IDS
        assert lister.files(listing) == val_images


def test_train_and_val_have_the_same_ids(
    tmp_path: Path,
    lister: Callable,
    images: dict,
    val_images: dict,
    train_tar: bytes,
    val_tar: bytes,
    make_tar: Callable,
) -> None:
    """Also where either alone is listed, and where train lacks a class."""
    with tarfile.open(fileobj=io.BytesIO(train_tar)) as tar:
        part = {name: tar.extractfile(name).read() for name in tar.getnames()[:2]}  # type: ignore[union-attr]
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(make_tar(part.items()))
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(val_tar)
    (tmp_path / "ILSVRC2012_img_test_v10102019.tar").write_bytes(b"left out")
    (tmp_path / "synset_labels.txt").write_text(VAL_TEXT)
    train, val = lister(tmp_path)
    assert (train.split, val.split) == ("train", "val")
    assert train.classes == val.classes == CLASSES
    assert {e.name[:9]: e.label for e in lister.entries(train)} == {"n01440764": 1, "n02119789": 2}
    assert lister.files(train) == {n: d for n, d in images.items() if not n.startswith(CLASSES[0])}
    assert lister.files(val) == val_images
    labels = lister.labels(train)
    alone = lister.one(tmp_path, split="train")
    assert (alone.split, alone.classes, lister.labels(alone)) == ("", CLASSES, labels)


def test_labels_that_do_not_fit(tmp_path: Path, lister: Callable, val_tar: bytes, make_tar: Callable) -> None:
    tar = tmp_path / "in" / "ILSVRC2012_img_val.tar"
    tar.parent.mkdir()
    tar.write_bytes(val_tar)
    with pytest.raises(CrispError, match=r"img_val\.tar: holds no labels; give --labels ILSVRC2012_devkit"):
        lister(tar)
    kit = devkit()
    empty = io.BytesIO()
    with tarfile.open(fileobj=empty, mode="w:gz"):
        pass
    for name, data, message in (
        ("few.txt", VAL_TEXT[:20].encode(), r"few\.txt: labels of 2 images, but .* has 5"),
        ("names.txt", b"n01440764 tench\n", "line 1: 'n01440764 tench' is no WordNet id; write one per line"),
        ("a.csv", b"ImageId,PredictionString\n", "line 1: .* is no WordNet id"),
        ("empty.txt", b"\n", "no line in it"),
        ("kit.tar.gz", kit[: len(kit) // 2], r"kit\.tar\.gz: .*; --labels takes ILSVRC2012_devkit_t12\.tar\.gz"),
        ("not.tar.gz", b"n01440764", r"not\.tar\.gz: .*; --labels takes"),
        ("other.tar.gz", empty.getvalue(), "no data/ILSVRC2012_validation_ground_truth.txt in it"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CrispError, match=message):
            lister(tar, labels=str(tmp_path / name))
    with pytest.raises(CrispError, match=r"none\.txt: No such file"):
        lister(tar, labels=str(tmp_path / "none.txt"))


def test_a_train_tar_that_was_cut_short(tmp_path: Path, lister: Callable, train_tar: bytes) -> None:
    path = tmp_path / "ILSVRC2012_img_train.tar"
    for cut in [*range(0, len(train_tar) - 10240, 1700), len(train_tar.rstrip(b"\0"))]:
        path.write_bytes(train_tar[:cut])
        with pytest.raises(CrispError, match="cut short"):
            lister(path)


@pytest.mark.parametrize("cut", [0, 100, 700, 1024, 2048])
def test_a_class_tar_that_was_cut_short(
    tmp_path: Path, lister: Callable, make_tar: Callable, make_jpegs: Callable, cut: int
) -> None:
    good = make_tar([(f"n00000002_{i}.JPEG", data) for i, data in enumerate(make_jpegs(3))])
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(
        make_tar([("n00000001.tar", good), ("n00000002.tar", good[:cut]), ("n00000003.tar", good)])
    )
    with pytest.raises(CrispError, match=r"img_train\.tar, n00000002\.tar: .*cut short.*; download it again"):
        lister(tmp_path)


def test_what_is_no_image_of_train_is_rejected(
    tmp_path: Path, lister: Callable, make_tar: Callable, make_special: Callable, make_jpegs: Callable
) -> None:
    a, b, c = make_jpegs(3)
    first = make_tar([("1.JPEG", a)])
    second = make_tar([("../../1.JPEG", a), make_special("l", tarfile.SYMTYPE, "/x"), ("1.JPEG", b), ("1.JPEG", c)])
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(
        make_tar(
            [("n01.tar", first), ("README", b"?"), make_special("n02.tar", tarfile.SYMTYPE, "x"), ("n01.tar", second)]
        )
    )
    listing = lister.one(tmp_path)
    assert lister.files(listing) == {"n01/1.JPEG": c}
    assert listing.classes == ("n01",)
    assert sorted(listing.rejections) == [
        ("README", "beside the class tars"),
        ("n01.tar", "replaced: a later member has the same name"),
        ("n01/../../1.JPEG", "refused: name leads out of the archive"),
        ("n01/1.JPEG", "replaced: a later member has the same name"),
        ("n01/l", "refused: link in an archive"),
        ("n02.tar", "refused: link in an archive"),
    ]


def test_refusals(tmp_path: Path, lister: Callable, train_tar: bytes) -> None:
    store, source = tmp_path / "store", tmp_path / "source"
    store.mkdir()
    source.mkdir()
    with pytest.raises(CrispError, match="no ImageNet tar in it; give"):
        lister(source, layout="imagenet-tars")
    (store / "x").write_bytes(train_tar)
    (source / "ILSVRC2012_img_train.tar").symlink_to(store / "x")
    with pytest.raises(CrispError, match="a link out of the source; --follow-links takes it"):
        lister(source)
    assert len(lister.one(source, follow_links=True)) == 9
    (source / "ILSVRC2012_img_train_b.tar").write_bytes(train_tar)
    with pytest.raises(CrispError, match="are both of train; give one as SOURCE"):
        lister(source, follow_links=True)
    (store / "x").unlink()
    with pytest.raises(CrispError, match="broken link; mend or remove it"):
        lister(source)
    with pytest.raises(CrispError, match=r"split='val': .* has train"):
        lister(source / "ILSVRC2012_img_train_b.tar", split="val")


def test_tars_behind_a_url(lister: Callable, images: dict, val_images: dict, train_tar: bytes, val_tar: bytes) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name, data in (("train", train_tar), ("val", val_tar)):
        memory.pipe_file(f"/imagenet-tars/ILSVRC2012_img_{name}.tar", data)
    memory.pipe_file("/imagenet-tars/synset_labels.txt", VAL_TEXT.encode())
    train, val = lister("memory://imagenet-tars")
    assert lister.files(train) == images
    assert lister.files(val) == val_images
