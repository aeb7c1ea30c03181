"""Odd files from the source to the views: kept with their codec, read by plain webdataset, rendered alike by both."""

import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from crisp.batch import Batch
from crisp.config import DataConfig, OptimConfig, TrainConfig, ViewsConfig
from crisp.pipelines.loader import build_train_loader
from crisp.shard_format import Codec, open_shards
from crisp.shard_imagenet import ShardConfig, shard_imagenet

Photo = Callable[..., Image.Image]
Encode = Callable[..., bytes]


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    return exif


def _ycck(cmyk: bytes) -> bytes:
    """The same file said to hold YCCK, by the transform byte of its Adobe marker."""
    at = cmyk.index(b"Adobe") + 11
    return cmyk[:at] + b"\x02" + cmyk[at + 1 :]


def _photo(make: Photo, seed: int) -> Image.Image:
    return make(seed, 180 + 7 * seed, 230 + 11 * seed)


# Where the file lies, its codec, and how it is made of a photograph. Names say what the files once were.
KEPT: dict[str, tuple[Codec, Callable[[Image.Image, Encode], bytes]]] = {
    "a/colour.JPEG": (Codec.JPEG, lambda p, e: e(p)),
    "a/grayscale.JPEG": (Codec.JPEG, lambda p, e: e(p.convert("L"))),
    "a/CMYK.JPEG": (Codec.JPEG, lambda p, e: e(p.convert("CMYK"))),
    "a/YCCK.JPEG": (Codec.JPEG, lambda p, e: _ycck(e(p.convert("CMYK")))),
    "a/EXIF-rotated.JPEG": (Codec.JPEG, lambda p, e: e(p, exif=_rotated())),
    "a/progressive.JPEG": (Codec.JPEG, lambda p, e: e(p, progressive=True)),
    "b/PNG.JPEG": (Codec.PNG, lambda p, e: e(p, "PNG")),
    "b/WebP.JPEG": (Codec.WEBP, lambda p, e: e(p, "WEBP", quality=95)),
    "b/one pixel.JPEG": (Codec.JPEG, lambda p, e: e(p.resize((1, 1)))),
    "b/one pixel.png": (Codec.PNG, lambda p, e: e(p.resize((1, 1)), "PNG")),
    "b/name with spaces ß é 画像 %20.JPEG": (Codec.JPEG, lambda p, e: e(p)),
    "b/colour.JPEG": (Codec.JPEG, lambda p, e: e(p, quality=80)),  # the name of another one in a
}

REJECTED: dict[str, tuple[str, Callable[[Image.Image, Encode], bytes]]] = {
    "a/cut.JPEG": ("damaged or unusual JPEG: Premature end", lambda p, e: e(p)[:-400]),
    "a/zeroed tail.JPEG": ("damaged or unusual JPEG: Premature end", lambda p, e: e(p)[:-400] + bytes(400)),
    "a/empty.JPEG": ("empty", lambda p, e: b""),
    "a/text.JPEG": ("not JPEG, PNG or WebP: it begins with b'<html>404", lambda p, e: b"<html>404 Not Found</html>"),
    "a/animation.JPEG": ("GIF: DALI cannot decode it", lambda p, e: e(p, "GIF")),
    "a/large.JPEG": ("too many pixels: 400x400, more than 150000", lambda p, e: e(p.resize((400, 400)))),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.shard_imagenet.conftest import encode, photo

    folder = tmp_path_factory.mktemp("odd")
    for seed, (name, (_, make)) in enumerate([*KEPT.items(), *REJECTED.items()]):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(make(_photo(photo, seed), encode))
    return folder


@pytest.fixture(scope="module", params=["folders", "tars"])
def shards(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the folders, and of the same files in a tar of tars."""
    folder = tmp_path_factory.mktemp("shards")
    if request.param == "tars":
        with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
            for name in ("a", "b"):
                with tarfile.open(folder / f"{name}.tar", "w") as inner:
                    for path in sorted((source / name).iterdir()):
                        inner.add(path, path.name)
                outer.add(folder / f"{name}.tar", f"{name}.tar")
        source = folder / "ILSVRC2012_img_train.tar"
    shard_imagenet(ShardConfig(source=str(source), out=str(folder / "out"), workers=1, max_pixels=150_000))
    return folder / "out"


def _stored(shards: Path) -> dict[str, tuple[np.void, bytes]]:
    """Index row and bytes by source."""
    manifest, index = open_shards(shards)
    (shard,) = manifest.shards
    with tarfile.open(shards / shard.name) as tar:
        members = {member.name: member for member in tar}
        by_offset = {member.offset_data: name.split(".")[0] for name, member in members.items()}
        read: Any = tar.extractfile
        return {
            json.load(read(f"{by_offset[int(row['offset'])]}.json"))["source"]: (
                row,
                (shards / shard.name).read_bytes()[int(row["offset"]) :][: int(row["length"])],
            )
            for row in index
        }


def test_kept_and_rejected(shards: Path, source: Path) -> None:
    stored = _stored(shards)
    assert {name: Codec(row["codec"]) for name, (row, _) in stored.items()} == {
        n: codec for n, (codec, _) in KEPT.items()
    }
    for name, (row, data) in stored.items():
        assert data == (source / name).read_bytes()
        with Image.open(source / name) as image:
            assert (row["width"], row["height"]) == image.size  # as stored: not turned
        assert row["label"] == "ab".index(name[0])
    reasons = dict(json.loads(line).values() for line in (shards / "rejected.jsonl").read_text().splitlines())
    assert reasons.keys() == REJECTED.keys()
    for name, (reason, _) in REJECTED.items():
        assert reasons[name].startswith(reason)


def test_plain_webdataset_reads_them(shards: Path, source: Path) -> None:
    read = list(webdataset.WebDataset(str(shards / "shard-000000.tar"), shardshuffle=False).decode("pil"))
    assert len(read) == len(KEPT)
    for sample in read:
        (pixels,) = (sample[extension] for extension in ("jpg", "png", "webp") if extension in sample)
        expected = Image.open(source / sample["json"]["source"]).convert("RGB")
        np.testing.assert_array_equal(np.asarray(pixels), np.asarray(expected))


def test_both_renderers_render_them_alike(shards: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'crisp-ssl[cuda13]'")
    config = TrainConfig(
        data=DataConfig(shards=shards, renderer="cpu", threads=1, parts=1),
        views=ViewsConfig(reference_px=64, global_px=64, local_px=32, local_views=2),
        optim=OptimConfig(global_batch=len(KEPT)),
    )
    batches: list[Batch] = []
    for renderer in ("cpu", "dali"):
        chosen = replace(config, data=replace(config.data, renderer=renderer))
        loader = build_train_loader(chosen, rank=0, world_size=1, device=torch.device("cpu"))
        batches.append(next(iter(loader)))
        loader.close()
    one, other = batches
    assert torch.equal(one.sample_id, other.sample_id)
    assert sorted(one.sample_id.tolist()) == list(range(len(KEPT)))
    level = 255 * 0.225  # of a normalised unit
    for name in ("reference", "global_views", "local_views"):
        difference = (getattr(one, name) - getattr(other, name)).abs().flatten(-3).mean(-1) * level
        assert difference.max() < 3, f"{name}: {difference}"


def test_orient_turns_what_exif_says(source: Path, tmp_path: Path) -> None:
    shard_imagenet(
        ShardConfig(source=str(source), out=str(tmp_path / "out"), workers=1, max_pixels=150_000, orient=True)
    )
    for name, (row, data) in _stored(tmp_path / "out").items():
        with Image.open(source / name) as image:
            if name == "a/EXIF-rotated.JPEG":
                assert (row["height"], row["width"]) == image.size
            else:
                assert data == (source / name).read_bytes()


def test_strict_stops_at_the_first(source: Path, tmp_path: Path) -> None:
    from crisp.errors import CrispError

    for name in random.Random(0).sample(sorted(REJECTED), 3):
        alone = tmp_path / name.split("/")[1]
        (alone / "in").mkdir(parents=True)
        (alone / "in" / "good.JPEG").write_bytes((source / "a/colour.JPEG").read_bytes())
        (alone / "in" / "odd.JPEG").write_bytes((source / name).read_bytes())
        with pytest.raises(CrispError, match=r"odd\.JPEG: .*; mend or remove it, or shard without --strict"):
            shard_imagenet(
                ShardConfig(
                    source=str(alone / "in"), out=str(alone / "out"), workers=1, max_pixels=150_000, strict=True
                )
            )
