import io
import json
import logging
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from crisp.errors import CrispError


@pytest.fixture
def jpegs(make_jpegs: Callable) -> list[bytes]:
    return make_jpegs(6)


def test_samples_of_shards(tmp_path: Path, jpegs: list[bytes], make_tar: Callable, lister: Callable) -> None:
    first = make_tar(
        [
            ("a/0.jpg", jpegs[0]),
            ("a/0.cls", b"2"),
            ("a/0.json", b'{"source": "not for us"}'),
            ("1.CLS", b" 0\n"),
            ("1.JPEG", jpegs[1]),
            ("2.Png", jpegs[2]),
            ("3.webp", jpegs[3]),
            ("3.cls", b"-1"),
        ]
    )
    (tmp_path / "b.tar").write_bytes(make_tar([("a/0.jpeg", jpegs[4]), ("a/0.cls", b"1")]))
    (tmp_path / "a.tar").write_bytes(first)
    (tmp_path / "._a.tar").write_bytes(b"macOS leaves such")
    (tmp_path / "README").write_text("?")
    listing = lister.one(tmp_path)
    assert [(e.name, e.label) for e in lister.entries(listing)] == [
        ("a.tar/a/0.jpg", 2),
        ("a.tar/1.JPEG", 0),
        ("a.tar/2.Png", -1),
        ("a.tar/3.webp", -1),
        ("b.tar/a/0.jpeg", 1),
    ]
    assert list(lister.files(listing).values()) == jpegs[:5]
    assert listing.classes == ("0", "1", "2")
    assert listing.rejections == ()
    assert not listing.by_class
    assert lister.files(lister.one(tmp_path / "b.tar")) == {"b.tar/a/0.jpeg": jpegs[4]}


def test_what_is_no_sample_is_rejected(
    tmp_path: Path, jpegs: list[bytes], make_tar: Callable, make_special: Callable, lister: Callable
) -> None:
    data = make_tar(
        [
            ("0.jpg", jpegs[0]),
            ("0.png", jpegs[1]),
            ("1.cls", b"1"),
            ("1.txt", b"no image"),
            ("2.jpg", jpegs[2]),
            ("2.cls", b"cat"),
            ("3.jpg", b"replaced"),
            ("3.jpg", jpegs[3]),
            ("4.jpg", jpegs[4]),
            ("4.cls", b"9" * 30),
            ("5.seg.png", jpegs[5]),
            ("../6.jpg", jpegs[5]),
            ("/7.jpg", jpegs[5]),
            make_special("8.jpg", tarfile.SYMTYPE, "0.jpg"),
            make_special("9.jpg", tarfile.LNKTYPE, "0.jpg"),
            make_special("10.jpg", tarfile.FIFOTYPE),
            ("README", b"?"),
        ]
    )
    (tmp_path / "x.tar").write_bytes(data)
    listing = lister.one(tmp_path)
    assert lister.files(listing) == {"x.tar/0.jpg": jpegs[0], "x.tar/3.jpg": jpegs[3]}
    assert listing.classes == ()
    assert lister.rejected(listing) == {
        "x.tar/0.png": "second image of a sample: 0.jpg is the first",
        "x.tar/1": "no image: members cls, txt",
        "x.tar/2.jpg": "label is not a whole number: cat",
        "x.tar/3.jpg": "replaced: a later member has the same name",
        "x.tar/4.jpg": "label is not a whole number: 99999999999999999999",
        "x.tar/5": "no image: members seg.png",
        "x.tar/../6.jpg": "refused: name leads out of the archive",
        "x.tar//7.jpg": "refused: absolute name",
        "x.tar/8.jpg": "refused: link in an archive",
        "x.tar/9.jpg": "refused: link in an archive",
        "x.tar/10.jpg": "not a regular file",
        "x.tar/README": "no key or no extension",
    }


def _own(make_tar: Callable, name: str, jpeg: bytes, label: int) -> bytes:
    about = json.dumps({"source": name, "height": 20, "width": 30}).encode()
    return make_tar([("000000000.jpg", jpeg), ("000000000.cls", b"%d" % label), ("000000000.json", about)])


def test_own_shards_keep_names_and_classes(
    tmp_path: Path, jpegs: list[bytes], make_tar: Callable, lister: Callable
) -> None:
    strange = os.fsdecode("é ".encode() + b"\xe9.jpg")
    for folder, name, label in (("train", f"b/{strange}", 1), ("val", "a/1", 0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shard-000000.tar").write_bytes(_own(make_tar, name, jpegs[label], label))
        (tmp_path / folder / "manifest.json").write_text(json.dumps({"classes": ["a", "b", "c"], "new": 1}))
        (tmp_path / folder / "index.npy").write_bytes(b"?")
    train, val = lister(tmp_path)
    assert (train.split, val.split) == ("train", "val")
    assert train.classes == val.classes == ("a", "b", "c")
    assert lister.labels(train) == {f"b/{strange}": 1}
    assert lister.files(val) == {"a/1": jpegs[0]}
    (tmp_path / "train/manifest.json").write_text(json.dumps({"classes": ["a", "b"]}))
    with pytest.raises(CrispError, match=r"val/manifest\.json: other classes than .*train/manifest\.json"):
        lister(tmp_path)
    assert lister.one(tmp_path, split="train").classes == ("a", "b")
    (tmp_path / "train/manifest.json").write_text("{")
    assert lister.labels(lister.one(tmp_path / "train")) == {"shard-000000.tar/000000000.jpg": 1}


def test_what_crisp_cannot_have_written_gives_no_name(
    tmp_path: Path, jpegs: list[bytes], make_tar: Callable, lister: Callable
) -> None:
    (tmp_path / "manifest.json").write_text('{"classes": []}')
    texts = [b"{", b"[]", b'{"source": 1}', b'{"source": "\\ud800"}', b"\xff"]
    members = [m for i, text in enumerate(texts) for m in ((f"{i}.jpg", jpegs[i]), (f"{i}.json", text))]
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    assert lister.files(lister.one(tmp_path)) == {f"x.tar/{i}.jpg": jpegs[i] for i in range(len(texts))}


def test_splits_in_folders_and_in_names(
    tmp_path: Path, jpegs: list[bytes], make_tar: Callable, lister: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """Classes for both are as many as the largest label of either says."""
    for name in ("folders/train/0", "folders/validation/0", "names/in1k-train-0", "names/in1k-validation-00"):
        label = b"%d" % ("train" in name)
        path = tmp_path / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_tar([("x.jpg", jpegs[0]), ("x.cls", label)]))
    (tmp_path / "names/in1k-test-0.tar").write_bytes(b"?")
    with caplog.at_level(logging.INFO):
        for source in ("folders", "names"):
            train, val = lister(tmp_path / source)
            assert (train.split, val.split) == ("train", "val")
            assert train.classes == val.classes == ("0", "1")
            assert ([e.label for e in lister.entries(train)], [e.label for e in lister.entries(val)]) == ([1], [0])
            assert lister.one(tmp_path / source, split="val").split == ""
    assert "in1k-test-0.tar: left out" in caplog.text
    (tmp_path / "names/more.tar").write_bytes(b"?")
    with pytest.raises(CrispError, match=r"more\.tar: no train or val in its name, as others there have"):
        lister(tmp_path / "names")


def test_class_names_by_line(tmp_path: Path, jpegs: list[bytes], make_tar: Callable, lister: Callable) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.tar").write_bytes(make_tar([("x.jpg", jpegs[0]), ("x.cls", b"1")]))
    (tmp_path / "names").write_text("zebra\nape\n")
    assert lister.one(tmp_path / "in", classes=str(tmp_path / "names")).classes == ("zebra", "ape")
    (tmp_path / "names").write_text("zebra\n")
    with pytest.raises(CrispError, match="names: label 1, but 1 class names; labels count from 0"):
        lister(tmp_path / "in", classes=str(tmp_path / "names"))


def test_a_shard_that_was_cut_short(tmp_path: Path, jpegs: list[bytes], make_tar: Callable, lister: Callable) -> None:
    data = make_tar([("0.jpg", jpegs[0]), ("0.cls", b"1")])
    for cut in (300, 700, 1800, len(data.rstrip(b"\0"))):
        (tmp_path / "x.tar").write_bytes(data[:cut])
        with pytest.raises(CrispError, match=r"x\.tar: .*cut short"):
            lister(tmp_path)


def test_refusals(tmp_path: Path, jpegs: list[bytes], make_tar: Callable, lister: Callable) -> None:
    shard = make_tar([("0.jpg", jpegs[0])])
    (tmp_path / "x.tar").write_bytes(shard)
    with pytest.raises(CrispError, match="the labels of WebDataset shards lie in them; leave --labels out"):
        lister(tmp_path, labels="x.csv")
    with pytest.raises(CrispError, match=r"split='val': .* has no split"):
        lister(tmp_path, split="val")
    (tmp_path / "x.tar").write_bytes(make_tar([("0.jpg", jpegs[0]), ("inner.tar", shard)]))
    with pytest.raises(CrispError, match=r"holds tars .*--layout imagenet-tars"):
        lister(tmp_path)
    (tmp_path / "x.tar").unlink()
    for name in ("x.tar.gz", "x.tgz"):
        (tmp_path / name).write_bytes(b"?")
        for source in (tmp_path, tmp_path / name):
            with pytest.raises(CrispError, match=rf"{name}: compressed, .*; gunzip it first"):
                lister(source)
        (tmp_path / name).unlink()
    with pytest.raises(CrispError, match="no shard of train or val in it"):
        lister(tmp_path, layout="webdataset")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/n01440764.tar").write_bytes(shard)
    with pytest.raises(CrispError, match="train: holds ImageNet's class tars; give this folder as SOURCE"):
        lister(tmp_path)


def test_webdataset_reads_the_same_samples(
    tmp_path: Path, jpegs: list[bytes], make_tar: Callable, lister: Callable
) -> None:
    """What counts as key and extension is webdataset's rule."""
    from webdataset.tariterators import base_plus_ext

    names = ["a.jpg", "b/c.d/e.f.jpg", "no", ".hidden.jpg", "d/x.jpg", "x.tar.d/y.jpg"]
    (tmp_path / "x.tar").write_bytes(make_tar((name, jpegs[i % 6]) for i, name in enumerate(names)))
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "x.tar").read_bytes())) as tar:
        theirs = [n for n in tar.getnames() if base_plus_ext(n)[1] == "jpg" and base_plus_ext(n)[0]]
    assert [e.name for e in lister.entries(lister.one(tmp_path / "x.tar"))] == [f"x.tar/{name}" for name in theirs]


def test_shards_behind_a_url(jpegs: list[bytes], make_tar: Callable, lister: Callable) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/wds-source/0.tar", make_tar([("0.jpg", jpegs[0]), ("0.cls", b"1")]))
    assert lister.files(lister.one("memory://wds-source")) == {"0.tar/0.jpg": jpegs[0]}
