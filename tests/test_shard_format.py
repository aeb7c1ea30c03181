import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from crisp.errors import CrispError
from crisp.shard_format import (
    INDEX_DTYPE,
    Codec,
    Manifest,
    ShardInfo,
    detect_codec,
    fingerprint,
    open_shards,
    parse_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of three samples each, as far as opening looks: names, sizes, index, manifest."""
    index = np.zeros(6, INDEX_DTYPE)
    index["shard"] = np.repeat([0, 1], 3)
    index["offset"] = np.tile([0, 10, 20], 2)
    index["length"] = 10
    index["checksum"] = zlib.crc32(b"x" * 10)
    np.save(tmp_path / "index.npy", index)
    shards = tuple(ShardInfo(name=f"shard-{i:06d}.tar", samples=3, bytes=30, checksum=7) for i in range(2))
    for shard in shards:
        (tmp_path / shard.name).write_bytes(b"x" * 30)
    manifest = Manifest(samples=6, rejected=1, classes=("a", "é"), shards=shards, index_fingerprint=fingerprint(index))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.to_json()))
    return tmp_path


def _change_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_opens(folder: Path) -> None:
    manifest, index = open_shards(folder)
    assert manifest.classes == ("a", "é")
    assert manifest.shards[1] == ShardInfo(name="shard-000001.tar", samples=3, bytes=30, checksum=7)
    assert index["offset"].tolist() == [0, 10, 20] * 2
    with pytest.raises(ValueError, match="read-only"):
        index["label"][0] = 1


def test_manifest_survives_json(folder: Path) -> None:
    manifest, _ = open_shards(folder)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_a_row_costs_at_most_forty_bytes() -> None:
    assert INDEX_DTYPE.itemsize == 33


def test_codec_by_first_bytes() -> None:
    assert detect_codec(b"\xff\xd8\xff\xe0" + bytes(20)) is Codec.JPEG
    assert detect_codec(memoryview(b"\x89PNG\r\n\x1a\n" + bytes(20))) is Codec.PNG
    assert detect_codec(b"RIFF\x01\x02\x03\x04WEBPVP8 ") is Codec.WEBP
    for other in (b"", b"GIF89a", b"RIFF\x01\x02\x03\x04WAVE", b"\xff\xd8"):
        assert detect_codec(other) is None
    assert [codec.extension for codec in Codec] == ["jpg", "png", "webp"]


def _drop(name: str) -> object:
    return lambda folder: (folder / name).unlink()


def _write(name: str, data: bytes) -> object:
    return lambda folder: (folder / name).write_bytes(data)


def _flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "index.npy").read_bytes())
    data[-40] ^= 1
    (folder / "index.npy").write_bytes(data)


def _cut(name: str, count: int) -> object:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def _other_rows(folder: Path) -> None:
    np.save(folder / "index.npy", np.zeros(5, INDEX_DTYPE))


def _other_type(folder: Path) -> None:
    np.save(folder / "index.npy", np.zeros(6, np.int64))


REFUSED = {
    "no manifest": (_drop("manifest.json"), "no manifest.json, so not a folder of shards; write one with 'crisp shard"),
    "no index": (_drop("index.npy"), "no index.npy, so not a folder of shards; write one with 'crisp shard"),
    "a byte of the index": (_flip_a_byte, "index.npy: its fingerprint is not the manifest's; it was changed"),
    "truncated index": (_cut("index.npy", 5), "index.npy: not a readable index .*; it was changed"),
    "empty index": (_write("index.npy", b""), "index.npy: not a readable index .*; it was changed"),
    "other bytes as index": (_write("index.npy", b"hello" * 99), "index.npy: not a readable index .*; it was changed"),
    "an index of other length": (_other_rows, r"\(5,\) rows of 33 bytes, the manifest says 6 of 33; it was changed"),
    "an index of other type": (_other_type, r"\(6,\) rows of 8 bytes, the manifest says 6 of 33; it was changed"),
    "manifest cut": (_cut("manifest.json", 5), "manifest.json: not a manifest .*; shard the source again"),
    "manifest not text": (_write("manifest.json", b"\xff\xfe"), "manifest.json: not a manifest .*; shard the source"),
    "manifest a list": (_write("manifest.json", b"[1]"), "manifest.json: not a manifest .*; shard the source again"),
    "manifest without a field": (_write("manifest.json", b'{"version": 2}'), "manifest.json: not a manifest .*; shard"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line_with_the_remedy(kind: str, folder: Path) -> None:
    spoil, message = REFUSED[kind]
    spoil(folder)
    with pytest.raises(CrispError, match=message) as caught:
        open_shards(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CrispError, match=r"nowhere: no such folder; write shards with 'crisp shard SOURCE .*nowhere'"):
        open_shards(tmp_path / "nowhere")


def test_other_version(folder: Path) -> None:
    _change_manifest(folder, version=99)
    with pytest.raises(CrispError, match="format version 99, this crisp reads 2; shard the source again"):
        open_shards(folder)


def test_a_changed_manifest_is_noticed_by_who_reads_it_whole(folder: Path) -> None:
    parse_manifest((folder / "manifest.json").read_bytes(), "manifest.json")
    _change_manifest(folder, classes=["a", "b"])
    open_shards(folder)
    with pytest.raises(CrispError, match=r"manifest.json: its checksum is not that of its content; restore it"):
        parse_manifest((folder / "manifest.json").read_bytes(), "manifest.json")


def test_fingerprint_covers_small_indices_whole() -> None:
    index = np.zeros(100, INDEX_DTYPE)
    prints = {fingerprint(index), fingerprint(index[:99])}
    for i in range(100):
        changed = index.copy()
        changed["label"][i] = 1
        prints.add(fingerprint(changed))
    assert len(prints) == 102


def test_fingerprint_of_a_large_index_reads_few_rows() -> None:
    index = np.zeros(1000, INDEX_DTYPE)
    picked = np.unique(np.linspace(0, 999, 10).astype(int))
    changed = index.copy()
    changed["label"][picked[3]] = 1
    assert fingerprint(changed, rows=10) != fingerprint(index, rows=10)
    changed = index.copy()
    changed["label"][picked[3] + 1] = 1
    assert fingerprint(changed, rows=10) == fingerprint(index, rows=10)  # what the docstring admits


def test_manifest_is_immutable() -> None:
    manifest = Manifest(samples=0, rejected=0, classes=(), shards=(), index_fingerprint="")
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.samples = 1  # type: ignore[misc]
