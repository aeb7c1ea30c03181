"""The feed benchmark on a handful of images: its arithmetic, and that it measures what it says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crisp.benchmarks.feed import FeedConfig, gpus_fed, main, make_shards, read_mb_per_s, summarise
from crisp.benchmarks.loader_rate import LoaderRate
from crisp.errors import CrispError
from crisp.shard_format import open_shards
from crisp.shard_imagenet import ShardConfig, shard_imagenet


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs of 400 × 600 px, and two that are smaller than every short side."""
    folder = tmp_path_factory.mktemp("feed") / "images"
    random = np.random.default_rng(0)
    for i in range(8):
        target = folder / f"class-{i % 2}" / f"{i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (10, 15, 3), np.uint8))
        coarse.resize((600, 400) if i < 6 else (300, 200), Image.Resampling.BICUBIC).save(target, quality=98)
    return folder


@pytest.mark.parametrize(
    ("node", "gpu", "expected"),
    [(800, 400, 2.0), (799, 400, 1.9), (2300, 1000, 2.3), (2500, 1000, 2.5), (39, 400, 0.0), (690, 300, 2.3)],
)
def test_gpus_are_rounded_down_to_a_tenth(node: float, gpu: float, expected: float) -> None:
    assert gpus_fed(node, gpu) == expected


def test_read_rate() -> None:
    assert read_mb_per_s(400, 110) == 44


def test_summary_is_of_medians() -> None:
    turns = [LoaderRate(samples_per_s=rate, cpu_ms_per_sample=ms, renderer="cpu") for rate, ms in (
        (900, 2.0), (1000, 3.0), (400, 2.5),
    )]  # fmt: skip
    fed = summarise("256 px", turns, samples=8, kb_per_sample=30, cores=4, gpu_images_per_s=(400, 2500))
    assert (fed.samples_per_s, fed.slowest, fed.fastest, fed.rounds) == (900, 400, 1000, [900, 1000, 400])
    assert fed.samples_per_s_per_core == 225
    assert fed.cpu_ms_per_sample == 2.5
    assert fed.read_mb_per_s == 27
    assert fed.gpus == {"400": 2.2, "2500": 0.3}


def test_the_same_images_at_three_sizes(images: Path, tmp_path: Path) -> None:
    made = make_shards(FeedConfig(images=str(images), batch=4), tmp_path)
    assert list(made) == ["original", "320 px", "256 px"]
    short_sides = {}
    for name, path in made.items():
        index = open_shards(path)[1]
        short_sides[name] = sorted(np.minimum(index["width"], index["height"]).tolist())
    assert short_sides == {
        "original": [200] * 2 + [400] * 6,
        "320 px": [200] * 2 + [320] * 6,
        "256 px": [200] * 2 + [256] * 6,
    }


def test_of_shards_some_are_taken(images: Path, tmp_path: Path) -> None:
    shard_imagenet(ShardConfig(source=str(images), out=str(tmp_path / "shards"), workers=1))
    made = make_shards(FeedConfig(shards=tmp_path / "shards", batch=4, max_images=5), tmp_path / "made")
    assert [open_shards(path)[0].samples for path in made.values()] == [5, 5, 5]


def test_of_two_splits_the_training_images_are_measured(images: Path, tmp_path: Path) -> None:
    for split, names in (("train", ("0", "2", "4")), ("val", ("6",))):
        folder = tmp_path / "both" / split / "a"
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.jpg").write_bytes((images / "class-0" / f"{name}.jpg").read_bytes())
    made = make_shards(FeedConfig(images=str(tmp_path / "both"), batch=2), tmp_path / "made")
    assert [open_shards(path)[0].samples for path in made.values()] == [3, 3, 3]


def test_end_to_end(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "images": images, "json": tmp_path / "feed.json", "batch": 4, "rounds": 2, "seconds": 0.02, "threads": 1,
        "views.reference-px": 48, "views.global-px": 32, "views.local-px": 16, "views.local-views": 1,
    }  # fmt: skip
    main([*(f"--{name}={value}" for name, value in options.items()), "--gpu-images-per-s", "50", "100000"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("original", "320 px", "256 px", "50 img/s", "100000 img/s", "page cache"))
    written = json.loads((tmp_path / "feed.json").read_text())
    assert [fed["shards"] for fed in written["results"]] == ["original", "320 px", "256 px"]
    for fed in written["results"]:
        assert len(fed["rounds"]) == 2
        assert fed["samples"] == 8
        assert fed["gpus"]["50"] == gpus_fed(fed["samples_per_s"], 50)
    sizes = [fed["kb_per_sample"] for fed in written["results"]]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "one of --images DIR and --shards DIR"),
        ({"images": "a", "shards": Path("b")}, "one of --images DIR and --shards DIR"),
        ({"images": "a", "rounds": 0}, "rounds=0"),
        ({"images": "a", "threads": -1}, "threads=-1"),
        ({"images": "a", "gpu_images_per_s": ()}, "gpu_images_per_s"),
        ({"images": "a", "gpu_images_per_s": (400.0, 0.0)}, "gpu_images_per_s"),
    ],
)
def test_refuses_what_cannot_be_measured(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CrispError, match=message):
        FeedConfig(**values)


def test_a_batch_larger_than_the_data(images: Path, tmp_path: Path) -> None:
    with pytest.raises(CrispError, match="batch=64: there are 8 images"):
        make_shards(FeedConfig(images=str(images)), tmp_path)
