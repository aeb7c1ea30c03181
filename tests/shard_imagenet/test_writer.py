import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from crisp.shard_imagenet import ShardConfig, shard_imagenet


@pytest.mark.parametrize("shard_samples", [1, 3, 12])
def test_a_tar_is_byte_for_byte_webdatasets(shard_samples: int, class_folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard_imagenet(ShardConfig(source=str(class_folders), out=str(out), shard_samples=shard_samples, workers=1))
    tars = sorted(out.glob("*.tar"))
    assert len(tars) == 12 // shard_samples
    for path in tars:
        theirs = io.BytesIO()
        with (
            webdataset.TarWriter(theirs, encoder=False, mtime=0, user="crisp", group="crisp", mode=0o444) as writer,
            tarfile.open(path) as tar,
        ):
            for member in tar:
                key, _, extension = member.name.partition(".")
                data = tar.extractfile(member)
                assert data is not None
                writer.write({"__key__": key, extension: data.read()})
        assert path.read_bytes() == theirs.getvalue()


def test_a_name_that_is_no_text_survives(class_folders: Path, tmp_path: Path) -> None:
    name = b"not \xff utf-8.JPEG"
    (class_folders / "n01" / "Bild 1 ß.x.JPEG").rename(class_folders / "n01" / name.decode(errors="surrogateescape"))
    shard_imagenet(ShardConfig(source=str(class_folders), out=str(tmp_path / "out"), workers=1))
    sources = []
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        for member in tar:
            if member.name.endswith(".json"):
                data = tar.extractfile(member)
                assert data is not None
                sources.append(json.loads(data.read())["source"])
    assert f"n01/{name.decode(errors='surrogateescape')}" in sources
