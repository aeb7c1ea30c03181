import io
import json
import multiprocessing
import os
import pickle
import resource
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

import crisp.pipelines.shards
from crisp.errors import CrispError
from crisp.pipelines.faults import SampleError
from crisp.pipelines.shards import ShardSet
from crisp.shard_format import fingerprint
from crisp.shard_imagenet import ShardConfig, shard_imagenet


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for _ in range(24):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(stream, "JPEG")
        files.append(stream.getvalue())
    return files


@pytest.fixture
def folder(tmp_path: Path, images: list[bytes]) -> Path:
    """24 images in 8 shards."""
    (tmp_path / "source").mkdir()
    for i, data in enumerate(images):
        (tmp_path / "source" / f"{i:02d}.jpg").write_bytes(data)
    out = tmp_path / "out"
    per_shard = 3 * (max(map(len, images)) + 5 * 512)
    (sharded,) = shard_imagenet(
        ShardConfig(source=str(tmp_path / "source"), out=str(out), shard_bytes=per_shard, shuffle="no", workers=1)
    )
    manifest = sharded.manifest
    assert len(manifest.shards) == 8
    return out


def _write_into(folder: Path, name: str, at: int, data: bytes) -> None:
    with (folder / name).open("r+b") as stream:
        stream.seek(at)
        stream.write(data)


def test_reads_the_original_bytes(folder: Path, images: list[bytes]) -> None:
    shards = ShardSet(folder)
    assert len(shards) == 24 == shards.manifest.samples
    for i in np.random.default_rng(0).permutation(24):  # NumPy integers, in any order
        assert bytes(shards.read(i)) == images[i]
    assert shards.index["height"].tolist() == [16] * 24


def test_what_it_returns_is_read_only_bytes(folder: Path) -> None:
    data = ShardSet(folder).read(5)
    assert isinstance(data, memoryview)
    assert data.readonly
    assert simplejpeg.decode_jpeg(data).shape == (16, 24, 3)


def test_tars_are_opened_when_first_read(folder: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    shards = ShardSet(folder)
    at_open = open_files()
    assert at_open == before + 1  # the index
    shards.read(0)
    shards.read(1)
    assert open_files() == at_open + 1
    shards.read(23)
    assert open_files() == at_open + 2


def test_eight_threads(folder: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crisp.pipelines.shards, "_OPEN", 2)  # so that tars come and go under the readers
    shards = ShardSet(folder)

    def read(seed: int) -> int:
        ids = np.random.default_rng(seed).integers(0, 24, 500)
        return sum(bytes(shards.read(int(i))) == images[i] for i in ids)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [500] * 8


def test_bytes_outlive_their_tar(folder: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crisp.pipelines.shards, "_OPEN", 1)
    shards = ShardSet(folder)
    views = [shards.read(i) for i in range(24)]
    del shards
    assert [bytes(view) for view in views] == images


def test_more_shards_than_file_descriptors(folder: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crisp.pipelines.shards, "_OPEN", 3)
    shards = ShardSet(folder)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 6, limits[1]))
        assert [bytes(shards.read(i)) for i in range(24)] == images
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_pickle_is_a_path(folder: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    shards = ShardSet(Path("out"), verify=False)
    shards.read(0)
    data = pickle.dumps(shards)
    assert len(data) < 1000
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert bytes(again.read(7)) == images[7]
    assert again.verify is False


def test_another_process_reads(folder: Path, images: list[bytes]) -> None:
    shards = ShardSet(folder)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read_there, (shards, 9)) == images[9]


def _read_there(shards: ShardSet, sample_id: int) -> bytes:
    return bytes(shards.read(sample_id))


def test_checksum_mismatch(folder: Path, images: list[bytes]) -> None:
    row = ShardSet(folder).index[4]
    _write_into(folder, "shard-000001.tar", int(row["offset"]) + 200, b"\x00\x01\x02")
    shards = ShardSet(folder)
    message = r"shard-000001.tar: the bytes of sample 4 \(at \d+\) are not those that were indexed; restore it,"
    with pytest.raises(CrispError, match=message):
        shards.read(4)
    assert bytes(shards.read(3)) == images[3]
    unchecked = bytes(ShardSet(folder, verify=False).read(4))
    assert unchecked[200:203] == b"\x00\x01\x02"


def test_an_index_that_points_beyond_its_tar(folder: Path) -> None:
    index = np.load(folder / "index.npy")
    index["offset"][2] = 10**9
    np.save(folder / "index.npy", index)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["index_fingerprint"] = fingerprint(index)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CrispError, match="sample 2"):
        ShardSet(folder, verify=False).read(2)


def test_ids_out_of_range(folder: Path) -> None:
    shards = ShardSet(folder)
    for sample_id in (-1, 24):
        with pytest.raises(IndexError, match=f"sample {sample_id}: .* has 24"):
            shards.read(sample_id)


def test_a_folder_that_is_no_set_of_shards(tmp_path: Path) -> None:
    with pytest.raises(CrispError, match=r"no manifest\.json"):
        ShardSet(tmp_path)


def test_a_tar_that_is_lost(folder: Path) -> None:
    shards = ShardSet(folder)  # opening many shards must stay fast: it does not look at them
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(SampleError, match=r"shard-000002.tar: No such file or directory; restore it") as caught:
        shards.read(7)
    assert caught.value.kind == "shard"


def test_of_a_tar_that_is_cut_the_rest_is_read(
    folder: Path, images: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    index = ShardSet(folder).index
    (first, *_, last) = np.flatnonzero(index["shard"] == 2)
    os.truncate(folder / "shard-000002.tar", int(index["offset"][last]) + 10)
    shards = ShardSet(folder, verify=False)
    assert bytes(shards.read(int(first))) == images[first]
    assert "the manifest says" in caplog.text
    with pytest.raises(SampleError, match=r"shard-000002.tar: the bytes of sample \d+ .* are not those") as caught:
        shards.read(int(last))
    assert caught.value.kind == "bytes"


def test_a_tar_of_another_size_is_checked_even_where_checksums_are_off(folder: Path) -> None:
    row = ShardSet(folder).index[4]
    _write_into(folder, "shard-000001.tar", int(row["offset"]) + 200, b"\x00\x01\x02")
    with (folder / "shard-000001.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(SampleError, match="not those that were indexed"):
        ShardSet(folder, verify=False).read(4)


def test_agrees_with_tarfile(folder: Path) -> None:
    shards = ShardSet(folder)
    plain = []
    for shard in shards.manifest.shards:
        with tarfile.open(folder / shard.name) as tar:
            plain += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    assert [bytes(shards.read(i)) for i in range(24)] == plain


def test_damage_that_sizes_tell(folder: Path) -> None:
    assert ShardSet(folder).damaged_sizes() == []
    os.truncate(folder / "shard-000002.tar", 5000)
    (folder / "shard-000001.tar").unlink()
    (first, lost), (second, cut) = ShardSet(folder).damaged_sizes()
    assert (first, second) == (1, 2)
    assert "shard-000001.tar: No such file or directory; restore it" in lost
    assert "shard-000002.tar: 5000 bytes, the manifest says" in cut


def test_keys(folder: Path) -> None:
    shards = ShardSet(folder)
    with tarfile.open(folder / "shard-000001.tar") as tar:
        keys = [member.name.split(".")[0] for member in tar if member.name.endswith(".jpg")]
    ids = np.flatnonzero(shards.index["shard"] == 1)
    assert [shards.key(int(i)) for i in ids] == keys
    (folder / "shard-000002.tar").unlink()
    assert shards.key(int(np.flatnonzero(shards.index["shard"] == 2)[0])) == ""
