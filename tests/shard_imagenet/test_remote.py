"""Sources and shards in a store: a real S3 API over HTTP (moto's server) and plain HTTP, with faults injected."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from crisp import storage
from crisp.errors import CrispError
from crisp.shard_imagenet import ShardConfig, Sharded, shard_imagenet
from crisp.storage import Location
from tests.faulty_http import Fault, Faults, faulty_files

OPTIONS: dict[str, Any] = {"shard_bytes": 20_000, "workers": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 JPEGs in three classes, two files that are none, names with spaces and letters beyond ASCII."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(24):
        path = folder / ("a b", "n01", "élan")[i % 3] / f"Bild {i} ß+%.JPEG"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((60, 50), 40 + i).convert("RGB").save(path, "JPEG", quality=90)
    (folder / "n01" / "notes.txt").write_bytes(b"hello, world")
    (folder / "n01" / "empty.JPEG").write_bytes(b"")
    return folder


def _shard(source: str, out: str, **options: Any) -> Sharded:
    (sharded,) = shard_imagenet(ShardConfig(source=source, out=out, **{**OPTIONS, **options}))
    return sharded


def _upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with Location.of(f"{url}/{path.relative_to(folder)}").whole_file() as file:
                file.write(path.read_bytes())


def _contents(location: Location) -> dict[str, bytes]:
    return {
        name: data
        for found in location.children()
        for name, data in (
            ((found.name, (location / found.name).read()),)
            if found.is_file
            else ((f"{found.name}/{inner}", data) for inner, data in _contents(location / found.name).items())
        )
    }


def _every_fifth(*kinds: Fault) -> Callable[[int, str], Fault | None]:
    return lambda number, method: kinds[number // 5 % len(kinds)] if number % 5 == 0 else None


@pytest.fixture
def expected(images: Path, tmp_path: Path) -> dict[str, bytes]:
    _shard(str(images), str(tmp_path / "local"))
    return _contents(Location.of(tmp_path / "local"))


def test_from_and_to_a_store(images: Path, store: Faults, expected: dict[str, bytes]) -> None:
    _upload(images, "s3://data/images")
    sharded = _shard("s3://data/images", "s3://data/shards")
    assert sharded.manifest is not None
    assert (sharded.manifest.samples, sharded.manifest.rejected) == (24, 2)
    assert _contents(Location.of("s3://data/shards")) == expected
    assert _shard("s3://data/images", "s3://data/shards").files == 0


@pytest.mark.slow
def test_with_faults_of_every_kind(images: Path, store: Faults, expected: dict[str, bytes]) -> None:
    _upload(images, "s3://data/images")
    store.choose = _every_fifth("500", "cut", "refuse", "hang", "500", "cut", "refuse")
    _shard("s3://data/images", "s3://data/shards")
    assert store.injected.keys() == {"500", "cut", "refuse", "hang"}
    store.choose = lambda number, method: None
    assert _contents(Location.of("s3://data/shards")) == expected


@pytest.mark.slow
def test_a_store_that_stays_away_and_comes_back(
    images: Path, store: Faults, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    _upload(images, "s3://data/images")
    before = store.requests
    store.choose = lambda number, method: "500" if number > before + 60 else None
    with pytest.raises(CrispError) as raised:
        _shard("s3://data/images", "s3://data/shards")
    assert "(3 attempts); mend that and start again, finished shards are kept" in str(raised.value)
    assert "\n" not in str(raised.value)
    store.choose = lambda number, method: None
    there = {name: data for name, data in _contents(Location.of("s3://data/shards")).items() if name.endswith(".tar")}
    assert there
    assert there.items() <= expected.items()  # what has its name is whole
    sharded = _shard("s3://data/images", "s3://data/shards")
    assert 0 < sharded.files < 26  # the finished ones were not made again
    assert _contents(Location.of("s3://data/shards")) == expected


def test_from_a_tar_over_http(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(storage, "_SILENCE_S", 1)
    monkeypatch.setattr(storage._RemoteFile, "_BLOCK", 4096)
    storage._file_system.cache_clear()
    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web" / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in ("n01", "élan"):
            with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                for path in sorted((images / name).iterdir()):
                    inner.add(path, path.name)
            outer.add(tmp_path / f"{name}.tar", f"{name}.tar")
    _shard(str(tmp_path / "web" / "ILSVRC2012_img_train.tar"), str(tmp_path / "local"))
    faults = Faults(_every_fifth("500", "cut", "refuse", "hang"))
    with faulty_files(tmp_path / "web", faults) as url:
        _shard(f"{url}/ILSVRC2012_img_train.tar", str(tmp_path / "remote"))
        assert faults.injected.keys() == {"500", "cut", "refuse", "hang"}
        faults.choose = lambda number, method: None
        with pytest.raises(CrispError, match=r"nothing.tar: no such file or folder"):
            _shard(f"{url}/nothing.tar", str(tmp_path / "out"))
    assert _contents(Location.of(tmp_path / "remote")) == _contents(Location.of(tmp_path / "local"))
    storage._file_system.cache_clear()


@pytest.mark.slow
def test_urls_that_cannot_work(images: Path, store: Faults, tmp_path: Path) -> None:
    with pytest.raises(CrispError, match=r"ftps://: .*; give a path, or a URL of s3, gs or http"):
        _shard("ftps://nowhere/x", str(tmp_path / "out"))
    with pytest.raises(CrispError, match="s3://data/nothing: no such file or folder"):
        _shard("s3://data/nothing", str(tmp_path / "out"))
    _upload(images, "s3://data/images")
    with pytest.raises(CrispError, match="s3://data/images/shards: lies in the source s3://data/images"):
        _shard("s3://data/images", "s3://data/images/shards")
    _shard(str(images), "s3://data/shards")
    with Location.of("s3://data/other/file").whole_file() as file:
        file.write(b"x")
    with pytest.raises(CrispError, match=r"s3://data/other: not empty \(file\)"):
        _shard(str(images), "s3://data/other")
    assert not os.path.exists(tmp_path / "out")
