"""The step benchmark on a tiny model: that it measures what it says, not how fast anything is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from crisp.benchmarks import step as bench
from crisp.benchmarks import step_worker
from crisp.benchmarks.intervals import median_interval
from crisp.benchmarks.loader_rate import measure_loader
from crisp.benchmarks.step import (
    Headroom,
    StepBenchConfig,
    StepResult,
    explain_headroom,
    main,
    make_ratio,
    summarise,
    take_pairs,
)
from crisp.benchmarks.step_contenders import CONTENDERS, make_batch, synthetic_batch
from crisp.benchmarks.step_worker import StepTime, StepWorker
from crisp.config import OptimConfig, TrainConfig, to_json
from crisp.errors import CrispError
from crisp.process_settings import SETTINGS, environment_for_steps
from crisp.recipes import demo
from crisp.shard_imagenet import ShardConfig, shard_imagenet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / "images" / f"{i}.jpg")
    shard_imagenet(ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), workers=1))
    return folder / "shards"


def tiny(**values: Any) -> TrainConfig:
    """Demo's recipe, smaller still."""
    run = demo()
    return replace(
        run,
        views=replace(run.views, reference_px=48, global_px=48, local_px=32, local_views=2),
        model=replace(run.model, embed_dim=48, prototypes=32),
        data=replace(run.data, parts=1, **values),
        optim=OptimConfig(global_batch=4),
    )


# --- contenders and their batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_takes_steps_on_one_batch(name: str) -> None:
    run = tiny()
    batch = synthetic_batch(run, CPU)
    before = batch.global_views.clone()
    take_step = CONTENDERS[name](run, batch)
    take_step()
    take_step()
    assert torch.equal(batch.global_views, before)


def test_contenders_differ_in_the_regions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from crisp.benchmarks import step_contenders

    built, steps = [], []
    monkeypatch.setattr(step_contenders, "build_state", lambda config, world: built.append(config))
    monkeypatch.setattr(step_contenders, "train_step", lambda state, batch, schedule: steps.append(schedule))
    run = tiny()
    batch = synthetic_batch(run, CPU)
    for name in ("crisp", "ibot"):
        CONTENDERS[name](run, batch)()
    assert built[0] == run
    assert built[1] == replace(run, region=replace(run.region, enabled=False))
    assert steps[0] == steps[1]
    assert not steps[0].last_layer_frozen
    assert steps[0].learning_rate > 0


def test_the_schedules_end_with_the_run() -> None:
    run = replace(tiny(), optim=OptimConfig(global_batch=4, epochs=1, warmup_epochs=0))
    CONTENDERS["ibot"](run, synthetic_batch(run, CPU))()


def test_synthetic_batch_is_what_the_loader_gives(shards: Path) -> None:
    synthetic, real = synthetic_batch(tiny(), CPU), make_batch(tiny(shards=str(shards), threads=1), CPU)
    for name in real.__dataclass_fields__:
        ours, theirs = getattr(synthetic, name), getattr(real, name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
    assert synthetic.patch_masks.any()
    assert len(torch.unique(synthetic.view_from_reference)) > 20, "affines of drawn crops"
    assert torch.equal(synthetic_batch(tiny(), CPU).reference, synthetic.reference), "the same for every contender"
    assert synthetic_batch(tiny(pixels="float16"), CPU).reference.dtype == torch.float16


def test_loader_rate(shards: Path) -> None:
    rate = measure_loader(tiny(shards=str(shards), threads=1), device=CPU, seconds=0.05)
    assert rate.samples_per_s > 0
    assert rate.cpu_ms_per_sample > 0
    assert rate.renderer == "cpu"


# --- the process of a contender -------------------------------------------------------------------------------------


def test_a_worker_answers_with_seconds_and_memory() -> None:
    with StepWorker("crisp", to_json(tiny()), device="cpu", environment=environment_for_steps()) as worker:
        assert worker.step().step_s > 0
        assert worker.step().cpu_s > 0
        assert worker.peak_gb() > 0
        pid = worker._process.pid
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_worker_tells_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CrispError, match=r"nowhere: no such folder"):
        StepWorker(
            "crisp", to_json(tiny(shards=str(tmp_path / "nowhere"))), device="cpu", environment=environment_for_steps()
        )
    with pytest.raises(
        CrispError, match=r"contender nobody: its process failed \(KeyError: 'nobody'\); take a smaller"
    ):
        StepWorker("nobody", to_json(tiny()), device="cpu", environment=environment_for_steps())


def test_memory_sees_what_is_taken_and_given_back() -> None:
    memory = step_worker.Memory("cpu")
    taken = np.ones(40_000_000, np.uint8)
    assert taken.sum() == 40_000_000
    del taken
    assert 0.03 < memory.peak_gb() < 0.3


# --- arithmetic -----------------------------------------------------------------------------------------------------


class _Counting:
    def __init__(self, name: str, order: list[str]) -> None:
        self._name, self._order = name, order

    def step(self) -> StepTime:
        self._order.append(self._name)
        return StepTime(step_s=len(self._order), cpu_s=1)


def test_pairs_alternate_and_warm_up_does_not_count() -> None:
    order: list[str] = []
    workers: Any = {name: _Counting(name, order) for name in "ab"}
    taken = take_pairs(workers, pairs=3, warm_up=1)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    times = {name: [step.step_s for step in steps] for name, steps in taken.items()}
    assert times == {"a": [3, 6, 7], "b": [4, 5, 8]}


def result(name: str, steps_s: list[float], peak_gb: float) -> StepResult:
    return summarise(name, [StepTime(step_s=s, cpu_s=2 * s) for s in steps_s], batch=8, peak_gb=peak_gb)


def test_ratio_is_of_pairs() -> None:
    """A machine that is slow for two pairs of five does not move it."""
    ratio = make_ratio(result("a", [1.1, 2.2, 5.5, 1.1, 4.4], 3.0), result("b", [1, 2, 5, 1, 4], 2.0))
    assert ratio.name == "a ÷ b"
    assert ratio.step_s.median == ratio.step_s.low == ratio.step_s.high == pytest.approx(1.1)
    assert ratio.cpu_s.median == pytest.approx(1.1)
    assert ratio.peak_gb == 1.5


def test_interval_of_a_median() -> None:
    six = median_interval([6, 1, 5, 2, 4, 3])
    assert (six.median, six.low, six.high) == (3.5, 1, 6)
    assert six.confidence == pytest.approx(1 - 2 / 64)
    ten = median_interval(range(1, 11))
    assert (ten.low, ten.high) == (2, 9)
    assert ten.confidence == pytest.approx(1 - 22 / 1024)
    assert median_interval(range(1, 11), confidence=0.9).low == 2
    assert median_interval(range(1, 11), confidence=0.85).low == 3
    few = median_interval([2.0, 1.0, 3.0])
    assert (few.low, few.high, few.confidence) == (1, 3, 0.75)
    one = median_interval([7.0])
    assert (one.median, one.low, one.high, one.confidence) == (7, 7, 7, 0)


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    random, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        interval = median_interval(random.exponential(size=10).tolist())
        hits += interval.low <= np.log(2) <= interval.high
    assert hits / 2000 == pytest.approx(interval.confidence, abs=0.015)


@pytest.mark.parametrize(
    ("device", "renderer", "words"),
    [("cpu", "cpu", "share the cores"), ("cuda:0", "dali-gpu", "DALI had the GPU to itself"), ("cuda:0", "cpu", "")],
)
def test_headroom_is_explained(device: str, renderer: str, words: str) -> None:
    headroom = Headroom(
        renderer=renderer, loader_samples_per_s=median_interval([400]), step_images_per_s=50, headroom=8.0
    )
    said = explain_headroom(headroom, device=device)
    assert said.startswith("headroom 8.0: the loader alone delivers 400")
    assert "Above 1 the loader waits for training" in said
    assert words in said
    assert ("12.5%" in said) == (device == "cpu")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_end_to_end(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "recipe_named", lambda name: tiny(threads=1))
    monkeypatch.setattr(bench, "Console", lambda: Console(width=200))
    options = {
        "shards": shards, "json": tmp_path / "step.json", "recipe": "demo", "precision": "fp32", "batch": 4,
        "device": "cpu", "pairs": 2, "warm-up": 1, "seconds": 0.05,
    }  # fmt: skip
    main([*(f"--{name}={value}" for name, value in options.items()), "--epoch"])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "step.json").read_text())
    names = [each["name"] for each in written["results"]]
    assert names == ["crisp", "ibot", "ibot-published"]
    assert all(name in printed for name in (*names, "crisp ÷ ibot", "4 × RTX 3090", "headroom", "peak GB"))
    for each in written["results"]:
        assert len(each["steps"]) == 2
        assert each["images_per_s"] == pytest.approx(4 / each["step_s"]["median"])
        assert each["peak_gb"] > 0
    headroom = written["headroom"]
    assert headroom["headroom"] == pytest.approx(
        headroom["loader_samples_per_s"]["median"] / written["results"][0]["images_per_s"]
    )
    assert written["config"]["batch"] == 4


class _Fake:
    """A worker without a process."""

    def __init__(self, name: str, config: Any, *, device: str, environment: dict[str, str]) -> None:
        assert config["optim"]["global_batch"] == 4
        assert ("GOMP_SPINCOUNT" in environment) == (name != "ibot-published"), "published: without our settings"
        self._step_s = {"crisp": 2.0, "ibot": 1.0, "ibot-published": 4.0}[name]

    def step(self) -> StepTime:
        return StepTime(step_s=self._step_s, cpu_s=self._step_s)

    def peak_gb(self) -> float:
        return 2 * self._step_s

    def __enter__(self) -> "_Fake":
        return self

    def __exit__(self, *_: object) -> None: ...


def test_ratios_and_headroom_are_of_the_first_contender(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "StepWorker", _Fake)
    monkeypatch.setattr(bench, "recipe_named", lambda name: tiny())
    monkeypatch.setenv("GOMP_SPINCOUNT", SETTINGS["GOMP_SPINCOUNT"])
    config = StepBenchConfig(batch=4, device="cpu", pairs=3, shards=str(shards), seconds=0.01)
    measured = bench.bench_step(config)
    assert [(r.name, r.step_s.median, r.images_per_s, r.peak_gb) for r in measured.results] == [
        ("crisp", 2, 2, 4), ("ibot", 1, 4, 2), ("ibot-published", 4, 1, 8),
    ]  # fmt: skip
    assert [(ratio.name, ratio.step_s.median, ratio.peak_gb) for ratio in measured.ratios] == [
        ("crisp ÷ ibot", 2, 2), ("crisp ÷ ibot-published", 0.5, 0.5),
    ]  # fmt: skip
    assert measured.headroom is not None
    assert measured.headroom.headroom == measured.headroom.loader_samples_per_s.median / 2

    alone = bench.bench_step(replace(config, contenders=("ibot",), shards=None))
    assert alone.ratios == []
    assert alone.headroom is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"pairs": -1}, "pairs=-1"),
        ({"contenders": ()}, "contenders: none given"),
        ({"contenders": ("dino",)}, "no 'dino'; choose from crisp, ibot"),
        ({"contenders": ("ibot", "ibot")}, "ibot is named twice"),
    ],
)
def test_refuses_what_cannot_be_measured(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CrispError, match=message):
        StepBenchConfig(**values)


def test_a_batch_larger_than_the_data(shards: Path) -> None:
    with pytest.raises(CrispError, match=r"batch=9: .* has 8 samples; take a smaller batch"):
        bench.bench_step(StepBenchConfig(shards=str(shards), batch=9, device="cpu"))
