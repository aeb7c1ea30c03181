"""The loader benchmark on a handful of images: that it measures what it says, not how fast anything is."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from crisp.benchmarks import loader
from crisp.benchmarks.loader import LoaderBenchConfig, Result, bench_loader, main, results_table
from crisp.benchmarks.peers.torchvision_pil import Recipe, open_torchvision_pil
from crisp.config import ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.cpu import CpuRenderer
from crisp.pipelines.plan import make_plan
from crisp.pipelines.source import Work
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.shard import shard_imagenet


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.jpg")
    shard_imagenet(ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), workers=1))
    return folder / "shards"


def test_the_peer_makes_the_same_tensors(shards: Path) -> None:
    views = ViewsConfig()
    with open_torchvision_pil(shards, views, batch=3, workers=1) as batches:
        (reference, global_views, local_views), keys = next(batches)
    assert reference.shape == (3, 3, 224, 224)
    assert [view.shape for view in global_views] == [(3, 3, 224, 224)] * 2
    assert [view.shape for view in local_views] == [(3, 3, 96, 96)] * 10
    assert {tensor.dtype for tensor in (reference, *global_views, *local_views)} == {torch.float32}
    assert len(keys) == 3


def test_the_peers_reference_is_ours(tmp_path: Path) -> None:
    """Neither crop nor colour: decoding, resizing and normalising must then agree to a level."""
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((301, 187), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    views = ViewsConfig()
    plan = make_plan(
        views, seed=0, epoch=0, sample_id=np.array([0]), height_px=np.array([187]), width_px=np.array([301])
    )
    data = memoryview((tmp_path / "a.png").read_bytes())
    renderer = CpuRenderer(views, threads=1)
    ours = renderer.render(Work(encoded=[data], plan=plan, label=np.zeros(1, np.int64))).reference[0]
    renderer.close()
    theirs, _, _ = Recipe(views)(Image.open(tmp_path / "a.png"))
    assert (ours - theirs).abs().max() * 0.229 * 255 < 2.01  # PIL rounds between its two passes
    assert (ours - theirs).abs().mean() * 0.229 * 255 < 0.25


def test_the_peers_photometry_happens_as_often_as_configured() -> None:
    """Solarise and flip with certainty, everything else off: the views must be those of PIL's operators."""
    views = ViewsConfig(
        global_scale=(1.0, 1.0), aspect=(1.0, 1.0), flip_probability=1.0, jitter_probability=0.0,
        grayscale_probability=0.0, blur_probability=(0.0, 0.0, 0.0), solarize_probability=(0.0, 1.0, 0.0),
    )  # fmt: skip
    pixels = np.random.default_rng(2).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    _, (first, second), _ = Recipe(views)(Image.fromarray(pixels))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    shown = [((view * std + mean) * 255).round().permute(1, 2, 0).numpy() for view in (first, second)]
    flipped = pixels[:, ::-1]
    np.testing.assert_array_equal(shown[0], flipped)
    np.testing.assert_array_equal(shown[1], np.where(flipped >= 128, 255 - flipped, flipped))


def test_every_backend_takes_its_turns(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    options = "--backends cpu torchvision-pil --threads 1 --batch 2 --rounds 2 --seconds 0.05"
    main(["--shards", str(shards), "--json", str(file), *options.split()])
    written = json.loads(file.read_text())
    assert [result["backend"] for result in written["results"]] == ["cpu", "torchvision-pil"]
    for result in written["results"]:
        assert 0 < result["slowest"] <= result["samples_per_s"] <= result["fastest"]
        assert result["cpu_ms_per_sample"] > 0
    assert "cores" in written["hardware"]
    assert written["config"]["batch"] == 2
    assert "its colour is in HSV" in " ".join(capsys.readouterr().out.split()), "what differs stands beside the figure"


def test_dali_takes_its_turn(shards: Path) -> None:
    pytest.importorskip("nvidia.dali")
    (result,) = bench_loader(
        LoaderBenchConfig(shards=shards, backends=("dali-cpu",), threads=1, batch=2, rounds=1, seconds=0.05)
    )
    assert result.samples_per_s > 0


def test_a_turn_counts_whole_volleys(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that make a batch each deliver together: stopping within a volley would count others' batches."""
    clock = itertools.count()
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(clock) * 0.25)
    drawn = itertools.count()
    turn = loader._take_turn(drawn, LoaderBenchConfig(shards=shards, batch=10, seconds=1.0), threads=3)
    counted = next(drawn) - (2 * 3 + 2)
    assert counted % 3 == 0
    assert counted > 0
    assert turn.samples_per_s > 0


def test_the_table_compares_with_the_peer() -> None:
    def result(backend: str, rate: float) -> Result:
        return Result(
            backend=backend,
            samples_per_s=rate,
            slowest=rate - 1,
            fastest=rate + 1,
            cpu_ms_per_sample=3.25,
            cores_busy=1.5,
        )

    console = Console(width=100)
    with console.capture() as capture:
        console.print(results_table([result("cpu", 600), result("torchvision-pil", 50)]))
    text = capture.get()
    assert "12.0" in text
    assert "599–601" in text
    assert "HSV" in text


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"rounds": 0}, {"seconds": 0.0}, {"threads": -1}, {"backends": ()}])
def test_wrong_numbers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(CrispError, match=next(iter(wrong))):
        LoaderBenchConfig(shards=Path("x"), **wrong)  # type: ignore[arg-type]


def test_a_batch_larger_than_the_data_is_refused(shards: Path) -> None:
    with pytest.raises(CrispError):
        bench_loader(LoaderBenchConfig(shards=shards, backends=("cpu",), batch=64, threads=1))
