import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from crisp.errors import CrispError
from crisp.shard_imagenet.parquet_rows import ParquetRows
from crisp.storage import Location

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ("tench", "goldfish", "kit fox")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(
    path: Path,
    images: list,
    labels: list | None = None,
    *,
    group_rows: int = 100,
    names: tuple[str, ...] | None = NAMES,
    kind: object = IMAGE,
    columns: tuple[str, str] = ("image", "label"),
) -> None:
    """As `datasets` writes it."""
    table = pa.table({columns[0]: pa.array(images, kind)})
    features: dict[str, object] = {columns[0]: {"_type": "Image"}}
    if labels is not None:
        table = table.append_column(columns[1], pa.array(labels))
        features[columns[1]] = {"names": names, "_type": "ClassLabel"}
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group_rows)


def structs(jpegs: list[bytes]) -> list[dict]:
    return [{"bytes": data, "path": f"n{i % 2}/{i // 2}.JPEG"} for i, data in enumerate(jpegs)]


@pytest.fixture
def jpegs(make_jpegs: Callable) -> list[bytes]:
    return make_jpegs(23)


@pytest.mark.parametrize("group_rows", [1, 5, 7, 23])
def test_a_file(tmp_path: Path, jpegs: list[bytes], lister: Callable, group_rows: int) -> None:
    labels = [i % 3 for i in range(23)]
    write(tmp_path / "x.parquet", structs(jpegs), labels, group_rows=group_rows)
    for source in (tmp_path / "x.parquet", tmp_path):
        listing = lister.one(source)
        assert listing.classes == NAMES
        entries = lister.entries(listing)
        assert [e.label for e in entries] == labels
        assert [e.offset for e in entries] == list(range(23))
        assert entries[3].name == "x.parquet/3/n1/1.JPEG"
        assert list(lister.files(listing).values()) == jpegs
        if group_rows == 23:  # of fewer rows as small as these, most is what Parquet notes beside them
            true = sum(map(len, jpegs))
            assert 0.9 * true < sum(e.size for e in entries) < 1.3 * true
        assert listing.rejections == ()
        assert not listing.by_class


def test_splits_by_name(tmp_path: Path, jpegs: list[bytes], lister: Callable, caplog: pytest.LogCaptureFixture) -> None:
    rows = structs(jpegs)
    data = tmp_path / "data"
    write(data / "train-00000-of-00002.parquet", rows[:4], [0, 1, 2, 0])
    write(data / "train-00001-of-00002.parquet", rows[4:6], [1, 1])
    write(data / "validation-00000-of-00001.parquet", rows[6:9], [0, None, -1])
    write(data / "test-00000-of-00001.parquet", rows[9:12], [-1, -1, -1])
    with caplog.at_level(logging.INFO):
        for source in (tmp_path, data):
            train, val = lister(source)
            assert (train.split, val.split) == ("train", "val")
            assert [e.label for e in lister.entries(train)] == [0, 1, 2, 0, 1, 1]
            assert [e.label for e in lister.entries(val)] == [0, -1, -1]
            assert list(lister.files(train).values()) == jpegs[:6]
            assert list(lister.files(val).values()) == jpegs[6:9]
            assert len(lister.one(source, split="val")) == 3
    assert "test-00000-of-00001.parquet: left out" in caplog.text


def test_splits_in_folders(tmp_path: Path, jpegs: list[bytes], lister: Callable) -> None:
    write(tmp_path / "train/0000.parquet", structs(jpegs[:2]), [0, 0], names=None)
    write(tmp_path / "validation/0000.parquet", structs(jpegs[2:3]), [4], names=None)
    train, val = lister(tmp_path)
    assert train.classes == val.classes == ("0", "1", "2", "3", "4")
    assert list(lister.files(train).values()) == jpegs[:2]
    assert list(lister.files(val).values()) == jpegs[2:3]


def test_columns_of_other_kinds_and_names(tmp_path: Path, jpegs: list[bytes], lister: Callable) -> None:
    few = jpegs[:3]
    for i, (images, kind, names, columns) in enumerate(
        [
            (few, pa.binary(), None, ("image", "label")),
            (few, pa.large_binary(), NAMES, ("image", "label")),
            (
                [{"path": None, "bytes": b} for b in few],
                pa.struct(list(reversed(list(IMAGE)))),
                NAMES,
                ("image", "label"),
            ),
            ([{"bytes": b} for b in few], pa.struct([("bytes", pa.binary())]), NAMES, ("image", "label")),
            (structs(few), IMAGE, NAMES, ("img", "fine_label")),
        ]
    ):
        path = tmp_path / f"{i}.parquet"
        write(path, images, [2, 1, 0], kind=kind, names=names, columns=columns)
        listing = lister.one(path)
        assert list(lister.files(listing).values()) == few
        assert [e.label for e in lister.entries(listing)] == [2, 1, 0]
        assert listing.classes == (NAMES if names else ("0", "1", "2"))
    write(tmp_path / "9.parquet", structs(few))
    assert lister.one(tmp_path / "9.parquet").classes == ()


def test_rows_without_an_image(tmp_path: Path, jpegs: list[bytes], lister: Callable) -> None:
    write(tmp_path / "x.parquet", [None, {"bytes": None, "path": "a"}, {"bytes": jpegs[0], "path": None}], [0, 1, 2])
    assert lister.files(lister.one(tmp_path)) == {
        "x.parquet/0": None,
        "x.parquet/1/a": None,
        "x.parquet/2": jpegs[0],
    }


def test_paths_that_are_not_utf8(tmp_path: Path, jpegs: list[bytes], lister: Callable) -> None:
    paths = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xe9/x"], pa.binary()).buffers())
    image = pa.StructArray.from_arrays([pa.array(jpegs[:1], pa.binary()), paths], ["bytes", "path"])
    pq.write_table(pa.table({"image": image}), tmp_path / "x.parquet", use_dictionary=False)
    assert lister.files(lister.one(tmp_path)) == {"x.parquet/0/\udce9/x": jpegs[0]}


def test_labels_that_do_not_fit(tmp_path: Path, jpegs: list[bytes], lister: Callable) -> None:
    write(tmp_path / "x.parquet", structs(jpegs[:3]), [0, -7, 2**40])
    listing = lister.one(tmp_path)
    assert [e.offset for e in lister.entries(listing)] == [0]
    assert [r.kind for r in listing.rejections] == ["label out of range"] * 2
    write(tmp_path / "x.parquet", structs(jpegs[:1]), [3])
    with pytest.raises(CrispError, match="label 3, but 3 class names"):
        lister(tmp_path)
    (tmp_path / "names").write_text("z\ny\nx\nw\n")
    assert lister.one(tmp_path, classes=str(tmp_path / "names")).classes == ("z", "y", "x", "w")


def test_refusals(tmp_path: Path, jpegs: list[bytes], lister: Callable) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"photo": ["a"], "label": [1]}), path)
    with pytest.raises(CrispError, match=r"x\.parquet: columns photo: string, label: int64; needs image, a struct"):
        lister(path)
    pq.write_table(pa.table({"image": ["a"]}), path)
    with pytest.raises(CrispError, match="columns image: string; needs image, a struct of bytes and path, or binary"):
        lister(path)
    pq.write_table(pa.table({"image": jpegs[:1], "label": ["cat"]}), path)
    with pytest.raises(CrispError, match="column label is string; labels must be whole numbers"):
        lister(path)
    write(path, structs(jpegs[:1]), [0])
    with pytest.raises(CrispError, match="the labels of Parquet files lie in them; leave --labels out"):
        lister(path, labels="x.csv")
    write(tmp_path / "y.parquet", structs(jpegs[:1]), [0], names=("a", "b"))
    with pytest.raises(CrispError, match=r"y\.parquet: other class names than the files before"):
        lister(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(OSError, match="no Parquet file, or cut short"):
        lister(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CrispError, match="no Parquet file of train or val in it"):
        lister(tmp_path / "empty", layout="parquet")


def test_rows_in_any_order(tmp_path: Path) -> None:
    """Within batches, across batches and groups, forward and back."""
    values = [b"%d" % i * (i % 7) for i in range(300)]
    write(tmp_path / "x.parquet", [{"bytes": v, "path": ""} for v in values], group_rows=120)
    rows = ParquetRows(Location.of(tmp_path / "x.parquet"))
    order = [0, 1, 31, 32, 33, 119, 120, 299, 118, 0, 240, 239, 241, 5, 200, 130, 131, *range(300), *range(299, 0, -17)]
    assert [rows.read(row) for row in order] == [values[row] for row in order]


def test_damage_within_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write(path, [{"bytes": bytes([i]) * 1000, "path": ""} for i in range(100)], group_rows=50)
    data = bytearray(path.read_bytes())
    data[4:104] = bytes(100)
    path.write_bytes(data)
    rows = ParquetRows(Location.of(path))
    for _ in range(2):  # a failure leaves no half-read batch behind
        with pytest.raises(OSError, match=r"row 3 cannot be read"):
            rows.read(3)
    assert rows.read(99) == bytes([99]) * 1000


def test_files_behind_a_url(tmp_path: Path, jpegs: list[bytes], lister: Callable) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    write(tmp_path / "x.parquet", structs(jpegs), [0] * 23, group_rows=5)
    memory.pipe_file("/parquet-source/x.parquet", (tmp_path / "x.parquet").read_bytes())
    assert list(lister.files(lister.one("memory://parquet-source")).values()) == jpegs
