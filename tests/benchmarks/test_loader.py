"""The loader benchmark on a handful of images: that it measures what it says, not how fast anything is."""

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from crisp.benchmarks import loader
from crisp.benchmarks.loader import Measured, bench_loader, choose_backends, main, summarise
from crisp.benchmarks.loader_backends import BACKENDS, extract_images, prepare, why_missing
from crisp.benchmarks.loader_ceiling import Part, make_ceiling, make_scaling, sum_of_parts
from crisp.benchmarks.loader_config import LoaderBenchConfig
from crisp.benchmarks.loader_parts import time_decoding, time_parts
from crisp.benchmarks.loader_picture import draw_results
from crisp.benchmarks.loader_table import print_measured
from crisp.benchmarks.loader_turn import Turn, measure, take_turn
from crisp.benchmarks.machine import hardware
from crisp.benchmarks.peers import clock
from crisp.benchmarks.peers.clock import check_views, time_batches
from crisp.benchmarks.peers.loader_recipes import PilRecipe, TensorRecipe
from crisp.config import ViewsConfig, to_json
from crisp.errors import CrispError
from crisp.pipelines.cpu import CpuRenderer
from crisp.pipelines.plan import make_plan
from crisp.pipelines.source import Work
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.shard import shard_imagenet

SMALL = ViewsConfig(reference_px=48, global_px=32, local_px=16, local_views=3)
SMALL_OPTIONS = "--views.reference-px 48 --views.global-px 32 --views.local-px 16 --views.local-views 3"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    random = np.random.default_rng(0)
    for i in range(12):
        target = folder / "images" / f"class-{i % 2}" / f"{i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(target)
    shard_imagenet(ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), workers=1))
    return folder / "shards"


@pytest.fixture(scope="module")
def images(shards: Path) -> Path:
    return extract_images(shards, shards.parent / "extracted", limit=100)


def config_for(shards: Path, **values: Any) -> LoaderBenchConfig:
    quick = {"threads": 1, "batch": 4, "rounds": 1, "seconds": 0.05, "views": SMALL}
    return LoaderBenchConfig(shards=shards, **(quick | values))


def spec_for(backend: str, shards: Path, images: Path, **values: Any) -> dict[str, Any]:
    config = config_for(shards, **values)
    run = config.train_config(renderer="dali" if backend == "dali" else "cpu")
    return config.spec(backend, run, folder=images)


# --- what the backends make -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("spdl", "decode-only", "dali")])
def test_every_backend_makes_all_outputs(backend: str, shards: Path, images: Path) -> None:
    if BACKENDS[backend].needs_dali:
        pytest.importorskip("nvidia.dali")
    spec = spec_for(backend, shards, images)
    if backend == "cached-batch":  # it changes the renderers of its process
        assert take_turn(spec).samples_per_s > 0
        return
    with prepare(spec)() as batches:
        made = [next(batches) for _ in range(2)]
    for reference, global_views, local_views in made:
        check_views((reference, global_views, local_views), spec)
        assert reference.shape == (4, 3, 48, 48)
        assert [tuple(view.shape) for view in global_views] == [(4, 3, 32, 32)] * 2
        assert [tuple(view.shape) for view in local_views] == [(4, 3, 16, 16)] * 3
        assert all(0.1 < float(view.std()) < 3 for view in (reference, *global_views, *local_views)), "an image"
    assert not torch.equal(made[0][1][0], made[1][1][0]), "two batches differ"


def test_dali_told_every_draw_makes_all_outputs(shards: Path, images: Path) -> None:
    """In a process of its own: its workers import the main module."""
    pytest.importorskip("nvidia.dali")
    turn = take_turn(spec_for("dali", shards, images))
    assert turn.samples_per_s > 0
    assert turn.processes > 1, "the one that reads ahead counts too"


def test_dalis_own_graphs_for_a_gpu_can_be_constructed(shards: Path, images: Path) -> None:
    """They cannot run here; arguments that DALI does not take, and devices that do not fit, would show."""
    pytest.importorskip("nvidia.dali")
    from crisp.benchmarks.peers import loader_dali_random as peer

    spec = spec_for("dali-random", shards, images, device="gpu")
    options = peer._options(spec) | {"device_id": None}
    for graph in (
        peer._recipe(spec["config"]["views"], *peer._tars(spec), **options),
        peer._decode_alone(*peer._tars(spec), **options),
    ):
        assert graph.serialize()


@pytest.mark.parametrize("recipe", [PilRecipe, TensorRecipe])
def test_a_peers_reference_is_ours(recipe: Any, tmp_path: Path) -> None:
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
    image: Any = Image.open(tmp_path / "a.png")
    if recipe is TensorRecipe:
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    theirs, _, _ = recipe(to_json(views))(image)
    assert (ours - theirs).abs().max() * 0.229 * 255 < 2.01  # they round between the two passes
    assert (ours - theirs).abs().mean() * 0.229 * 255 < 0.25


@pytest.mark.parametrize("recipe", [PilRecipe, TensorRecipe])
def test_the_peers_photometry_happens_as_often_as_configured(recipe: Any) -> None:
    """Solarise and flip with certainty, everything else off: the views must be those of the plain operators."""
    views = ViewsConfig(
        global_scale=(1.0, 1.0), aspect=(1.0, 1.0), flip_probability=1.0, jitter_probability=0.0,
        grayscale_probability=0.0, blur_probability=(0.0, 0.0, 0.0), solarize_probability=(0.0, 1.0, 0.0),
    )  # fmt: skip
    pixels = np.random.default_rng(2).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    image = Image.fromarray(pixels) if recipe is PilRecipe else torch.from_numpy(pixels).permute(2, 0, 1)
    _, (first, second), _ = recipe(to_json(views))(image)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    shown = [((view * std + mean) * 255).round().permute(1, 2, 0).numpy() for view in (first, second)]
    flipped = pixels[:, ::-1]
    np.testing.assert_array_equal(shown[0], flipped)
    np.testing.assert_array_equal(shown[1], np.where(flipped >= 128, 255 - flipped, flipped))


def test_folders_hold_the_shards_images(shards: Path, tmp_path: Path) -> None:
    found = sorted(extract_images(shards, tmp_path / "all", limit=100).rglob("*.jpg"))
    originals = {path.read_bytes() for path in (shards.parent / "images").rglob("*.jpg")}
    assert {path.read_bytes() for path in found} == originals
    assert len({path.parent.name for path in found}) == 2, "a folder for each class"
    assert len(list(extract_images(shards, tmp_path / "few", limit=5).rglob("*.jpg"))) == 5


# --- the clock ------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ticks = itertools.count()
        monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks) * 0.25)
        self.drawn = 0

    @contextmanager
    def open(self) -> Iterator[Iterator[Any]]:
        yield self.batches()

    def batches(self) -> Iterator[Any]:
        while True:
            self.drawn += 1
            yield None


def test_a_turn_counts_whole_volleys(shards: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that make a batch each deliver together: stopping within a volley would count others' batches."""
    clock = Clock(monkeypatch)
    spec = spec_for("cpu", shards, images, workers=3, seconds=1.0)
    turn = Turn(**time_batches(clock.open, spec, has_views=False))  # type: ignore[arg-type]
    counted = clock.drawn - 1 - spec["warm_up"]
    assert spec["warm_up"] == 2 * 3 + 2
    assert counted % 3 == 0
    assert counted > 0
    assert turn.samples_per_s > 0
    assert turn.first_batch_s is not None
    assert turn.peak_mb > 10
    assert turn.processes >= 1


def test_a_turn_counts_something_however_slow_the_machine(
    shards: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    assert time_batches(clock.open, spec_for("cpu", shards, images, seconds=0.1), has_views=False)["samples_per_s"] > 0


def test_a_loader_that_makes_less_is_refused(shards: Path, images: Path) -> None:
    spec = spec_for("cpu", shards, images)
    reference, small = torch.zeros(4, 3, 48, 48), torch.zeros(4, 3, 16, 16)
    views = [torch.zeros(4, 3, 32, 32)] * 2
    check_views((reference, views, [small] * 3), spec)
    for wrong in ((reference, views, [small] * 2), (reference.half(), views, [small] * 3), (small, views, [small] * 3)):
        with pytest.raises(ValueError, match="backend cpu"):
            check_views(wrong, spec)


# --- ceilings -------------------------------------------------------------------------------------------------------


def test_the_sum_of_parts() -> None:
    assert sum_of_parts([100.0, 100.0]) == pytest.approx(50)
    parts = {
        "decode": Part(samples_per_s=1000, cpu_ms_per_sample=2),
        "resize": Part(samples_per_s=500, cpu_ms_per_sample=4),
    }
    ceiling = make_ceiling(parts, samples_per_s=250, cpu_ms_per_sample=8)
    assert ceiling.samples_per_s == pytest.approx(1000 / 3)
    assert ceiling.cpu_ms_per_sample == 6
    assert ceiling.share == pytest.approx(0.75)
    assert ceiling.share_by_cpu == pytest.approx(0.75)


def test_growth_with_threads() -> None:
    scaling = make_scaling(threads=2, cpu=(100, 190), decode_only=(1000, 2000))
    assert scaling.cpu == pytest.approx(1.9)
    assert scaling.decode_only == pytest.approx(2)
    assert scaling.ratio == pytest.approx(0.95)


def test_parts_and_decoding_are_measured(shards: Path, images: Path) -> None:
    parts = time_parts(spec_for("parts", shards, images))
    assert set(parts) == {"decode", "resize", "blur", "colour, solarise, normalise"}
    assert all(value > 0 for part in parts.values() for value in part.values())
    spec = spec_for("decode-only", shards, images, threads=2)
    assert Turn(**time_decoding(spec)).samples_per_s > 0  # type: ignore[arg-type]
    assert Turn(**measure(spec)).first_batch_s is None


# --- the whole ------------------------------------------------------------------------------------------------------


def run_main(shards: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    file = tmp_path / "results.json"
    main(["--shards", str(shards), "--json", str(file), *options, *SMALL_OPTIONS.split()])
    written: dict[str, Any] = json.loads(file.read_text())
    return written


def test_backends_take_their_turns(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--backends cpu torchvision-pil --threads 2 --workers 1 --batch 2 --rounds 1 --seconds 0.05 --no-ceiling"
    written = run_main(shards, tmp_path, *options.split())
    ours, theirs = written["results"]
    assert [(ours["backend"], ours["device"]), (theirs["backend"], theirs["device"])] == [
        ("cpu", "cpu"), ("torchvision-pil", "cpu"),
    ]  # fmt: skip
    assert (theirs["times_pil"], theirs["processes"], theirs["threads"]) == (1, 2, 1)
    assert (ours["processes"], ours["threads"]) == (1, 2)
    assert [claim["name"] for claim in written["claims"]] == ["cpu ÷ torchvision-pil"]
    assert written["ceiling"] is None
    assert "cores" in written["hardware"]
    assert written["config"]["batch"] == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "their colour is in HSV" in said, "what differs stands beside the figure"


@pytest.mark.slow
def test_all_that_is_installed(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "results.png"
    options = "--threads 2 --batch 2 --rounds 1 --seconds 0.05"
    written = run_main(shards, tmp_path, "--picture", str(picture), *options.split())
    assert [result["backend"] for result in written["results"]] == [
        name for name in BACKENDS if name not in written["skipped"]
    ]
    for result in written["results"]:
        assert 0 < result["slowest"] <= result["samples_per_s"] <= result["fastest"]
        assert result["rounds"] == [result["samples_per_s"]]
        assert result["cpu_ms_per_sample"] > 0
        assert result["peak_mb"] > 10
    assert written["ceiling"]["share"] > 0
    assert written["scaling"]["threads"] == 2
    assert len(written["claims"]) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = " ".join(capsys.readouterr().out.split())
    assert "of its own ceiling" in said
    assert "1→2 threads" in said


def a_turn(rate: float) -> Turn:
    return Turn(
        samples_per_s=rate,
        cpu_ms_per_sample=2000 / rate,
        cores_busy=1.5,
        cores_of_others=0.4,
        first_batch_s=0.5,
        peak_mb=rate,
        processes=1,
        gpu_mb=0,
    )


def test_others_are_compared_with_the_faster_pil_loader(shards: Path, tmp_path: Path) -> None:
    config = config_for(shards, rounds=3)
    turns = {
        ("cpu", 1): [a_turn(rate) for rate in (500, 600, 700)],
        ("torchvision-pil", 1): [a_turn(40)] * 3,
        ("webdataset-pil", 1): [a_turn(rate) for rate in (50, 40, 60)],
        ("dali", 1): [a_turn(100)] * 3,
    }
    measured = loader._measured(config, turns, [], {"spdl": "not there"})
    assert [result.times_pil for result in measured.results] == [12, 0.8, 1, 2]
    assert [result.spread for result in measured.results] == pytest.approx([1 / 3, 0, 0.4, 0])
    (claim,) = measured.claims
    assert (claim.name, claim.value, claim.goal, claim.met) == ("cpu ÷ webdataset-pil", 12, 6, True)
    assert claim.per_round == pytest.approx(700 / 60)
    console = Console(width=80)
    with console.capture() as capture:
        print_measured(measured, console)
    text = capture.get()
    assert "12.0" in text
    assert "500–700" in text
    assert "spdl: left out, not there" in text
    assert "up to 0.4 cores meanwhile" in text
    assert draw_results(measured, tmp_path / "a.png", about="a machine").stat().st_size > 1000


def test_the_gpu_shows_in_the_results(shards: Path) -> None:
    config = config_for(shards, device="gpu")
    devices = {name: summarise(name, [a_turn(1)], config, pil_per_s=None).device for name in BACKENDS}
    assert [name for name, device in devices.items() if device == "gpu"] == ["dali", "dali-random", "decode-only"]


def test_the_machine_is_said_in_one_line() -> None:
    assert "\n" not in hardware()
    assert "torch" in hardware()


# --- a user's mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0}, {"rounds": 0}, {"seconds": 0.0}, {"threads": -1}, {"workers": -1},
        {"backends": ("cpu", "pli")}, {"backends": ("cpu", "cpu")},
    ],
)  # fmt: skip
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CrispError, match=next(iter(wrong))):
        LoaderBenchConfig(shards=Path("x"), **wrong)


def test_what_cannot_be_measured_is_said_first(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CrispError, match="no such folder"):
        bench_loader(config_for(tmp_path / "nowhere"))
    with pytest.raises(CrispError, match=r"batch=64.*12 samples"):
        bench_loader(config_for(shards, batch=64))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(CrispError, match="--device cpu"):
        bench_loader(config_for(shards, device="gpu"))


def test_a_missing_peer_is_left_out_unless_it_is_named(shards: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    reason = why_missing("spdl", device="cpu", peers_python=python)
    assert reason is not None
    assert "--peers-python" in reason
    chosen, skipped = choose_backends(config_for(shards, peers_python=python))
    assert "spdl" not in chosen
    assert "cpu" in chosen
    assert skipped["spdl"] == reason
    with pytest.raises(CrispError, match="backend spdl"):
        choose_backends(config_for(shards, peers_python=python, backends=("cpu", "spdl")))


def test_a_turn_that_fails_is_one_line(shards: Path, images: Path) -> None:
    spec = spec_for("cpu", shards, images)
    nowhere = {**spec, "config": {**spec["config"], "data": {**spec["config"]["data"], "shards": "/nowhere"}}}
    with pytest.raises(CrispError, match="/nowhere"):
        take_turn(nowhere)
    with pytest.raises(CrispError, match="backend spdl: its turn failed"):
        take_turn({**spec, "backend": "spdl", "folder": "/nowhere", "config": {}}, peers_python=Path(sys.executable))


def test_spdl_where_it_is_installed(shards: Path, images: Path) -> None:
    pytest.importorskip("spdl.pipeline", reason="SPDL is a peer (benchmarks/peers/requirements.txt)")
    assert take_turn(spec_for("spdl", shards, images)).samples_per_s > 0


def test_measured_is_json() -> None:
    assert set(Measured.__dataclass_fields__) == {"results", "ceiling", "scaling", "claims", "skipped"}
