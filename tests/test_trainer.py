"""Whole runs of a tiny model: what a run writes, and that a killed one ends as an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import crisp.checkpoint
from crisp.checkpoint import list_checkpoints, list_damaged, load_module_state
from crisp.config import ModelConfig, RegionConfig, TrainConfig
from crisp.errors import CrispError
from crisp.machine import read_starts
from crisp.metrics import METRICS_FILE, read_metrics
from crisp.recipes import demo
from crisp.runs import CHECKPOINTS, FAULTS
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from crisp.trainer import train

STEPS = 9


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, photographs: dict[str, NDArray[np.uint8]]) -> Path:
    """Shards of 24 crops of natural photographs, three of them (eight samples each)."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, pixels in sorted(photographs.items())[:3]:
        for i in range(8):
            y, x = rng.integers(0, [pixels.shape[0] - 128, pixels.shape[1] - 150])
            target = folder / "images" / name / f"{i}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[y : y + 128, x : x + 150]).save(target, quality=90)
    shard_imagenet(
        ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), shard_bytes=40_000, workers=1)
    )
    return folder / "shards"


def tiny(shards: Path, run: Path) -> TrainConfig:
    """Nine steps of three epochs; drop path on, so that its draws are part of what a resume must repeat."""
    base = demo()
    return replace(
        base,
        out=run,
        log_every=1,
        checkpoint_every=2,
        data=replace(base.data, shards=str(shards), threads=1, renderer="cpu"),
        views=replace(base.views, reference_px=64, global_px=64, local_px=32, local_views=2),
        model=ModelConfig(
            arch="vit_tiny_patch16_224", embed_dim=48, depth=2, drop_path=0.2,
            head_hidden=32, head_bottleneck=16, prototypes=64,
        ),
        region=RegionConfig(blocks=2, threshold=0.3, min_patches=1),
        optim=replace(base.optim, epochs=3, global_batch=8, warmup_epochs=1),
    )  # fmt: skip


def as_arguments(config: TrainConfig) -> list[str]:
    """The command line of `tiny`: every field that differs from the recipe."""
    from crisp.runs import _leaves

    before = _leaves(demo())
    arguments = []
    for name, value in _leaves(config).items():
        if value != before[name]:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def final_state(run: Path) -> dict[str, object]:
    """Everything that decides how the run would go on."""
    checkpoint = list_checkpoints(run / CHECKPOINTS)[-1]
    assert checkpoint.name == f"step-{STEPS:08d}"
    return {name: load_module_state(checkpoint, name) for name in ("student", "teacher", "loss", "optimizer")}


def assert_identical(one: object, other: object, where: str = "state") -> None:
    """Bit for bit, all the way down."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys(), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple)
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_identical(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def test_a_run_writes_what_it_promises(shards: Path, tmp_path: Path) -> None:
    run = train(tiny(shards, tmp_path / "run"))
    lines = read_metrics(run / METRICS_FILE)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines] == [0] * 3 + [1] * 3 + [2] * 3
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_cls"] + line["loss_patch"] + line["loss_region"], rel=1e-5)
        assert 0 < line["loss_cls"] < 2 * np.log(64)
        assert 0 <= line["region_valid_frac"] <= 1
        assert line["regions_valid"] == pytest.approx(8 * line["region_valid_frac"])
        assert 0 <= line["data_wait_share"] <= 1
        assert line["images_per_s"] > 0
        assert 0 < line["gradient_norm"] < np.inf
    assert any(line["regions_valid"] for line in lines), "the region loss took part"
    assert len(list_checkpoints(run / CHECKPOINTS)) == 2
    assert list((run / "tensorboard").iterdir())
    (start,) = read_starts(run)
    assert (start.step, start.ranks, start.nodes) == (0, 1, 1)
    state = final_state(run)
    frozen_then_free = state["student"]["heads.last_layer.cls.weight_v"]  # type: ignore[index]
    assert not torch.equal(frozen_then_free, state["teacher"]["heads.last_layer.cls.weight_v"])  # type: ignore[index]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(shards: Path, tmp_path: Path) -> None:
    config = tiny(shards, tmp_path / "a")
    states = [
        final_state(train(replace(config, out=tmp_path / name, seed=seed)))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert_identical(states[0], states[1])
    with pytest.raises(AssertionError):
        assert_identical(states[0]["student"], states[2]["student"])


def test_regions_off_is_ibot(shards: Path, tmp_path: Path) -> None:
    config = tiny(shards, tmp_path / "run")
    run = train(replace(config, region=replace(config.region, enabled=False)))
    assert all(line["loss_region"] == 0 for line in read_metrics(run / METRICS_FILE))
    assert not any("concept" in key for key in final_state(run)["student"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train(shards: Path, tmp_path: Path, precision: str) -> None:
    run = train(replace(tiny(shards, tmp_path / "run"), precision=precision))
    assert all(np.isfinite(line["loss"]) for line in read_metrics(run / METRICS_FILE))


class StoppedError(Exception):
    """Raised by a test in the middle of a run."""


def test_resumed_in_the_same_process_ends_the_same(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import crisp.trainer as trainer

    whole = final_state(train(tiny(shards, tmp_path / "whole")))
    config = tiny(shards, tmp_path / "cut")
    step = trainer.train_step

    def stop_after(steps: int) -> Callable[..., object]:
        left = iter(range(steps))

        def limited(*args: object) -> object:
            if next(left, None) is None:
                raise StoppedError
            return step(*args)  # type: ignore[arg-type]

        return limited

    for attempt, steps in enumerate((1, 4, 2, 100)):  # the first dies before any checkpoint
        monkeypatch.setattr(trainer, "train_step", stop_after(steps))
        try:
            train(config, resume=attempt > 0)
        except StoppedError:
            continue
    assert_identical(final_state(tmp_path / "cut"), whole)
    lines = read_metrics(tmp_path / "cut" / METRICS_FILE)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def test_resume_refuses_other_data_and_damaged_checkpoints(shards: Path, tmp_path: Path) -> None:
    config = tiny(shards, tmp_path / "run")
    run = train(config)
    shard_imagenet(
        ShardConfig(source=str(shards.parent / "images"), out=str(tmp_path / "other"), shard_bytes=10_000, workers=1)
    )
    with pytest.raises(CrispError, match="not the data"):
        train(replace(config, data=replace(config.data, shards=str(tmp_path / "other"))), resume=True)
    with pytest.raises(CrispError, match="another architecture"):
        train(replace(config, model=replace(config.model, prototypes=32)), resume=True)
    for checkpoint in list_checkpoints(run / CHECKPOINTS):
        os.truncate(next((checkpoint / "student").iterdir()), 1000)
    with pytest.raises(CrispError, match=r"none of 2 checkpoints is whole; the newest: .*truncated"):
        train(config, resume=True)


def test_a_torn_checkpoint_is_passed_over_and_the_run_ends_the_same(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(shards, tmp_path / "run")
    run = train(config)
    whole = final_state(run)
    torn = list_checkpoints(run / CHECKPOINTS)[-1]
    os.truncate(next((torn / "optimizer").iterdir()), 1000)
    train(config, resume=True)
    assert (
        f"truncated; restore it, or delete it to go on from the one before; going on from step-{STEPS - 1:08d}"
        in caplog.text
    )
    assert_identical(final_state(run), whole)
    assert (run / CHECKPOINTS / f".damaged-{torn.name}").is_dir()
    assert list_damaged(run / CHECKPOINTS) == [STEPS]
    assert [start.step for start in read_starts(run)] == [0, STEPS - 1]


def test_a_full_disk_during_a_save_keeps_the_older_checkpoint_and_the_run_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(shards, tmp_path / "run")
    flush, flushed = crisp.checkpoint._flush, []

    def full_at_the_second_save(path: Path) -> None:
        flushed.append(path)
        if f"step-{4:08d}" in str(path):
            raise OSError(28, "No space left on device")
        flush(path)

    monkeypatch.setattr(crisp.checkpoint, "_flush", full_at_the_second_save)
    run = train(replace(config, keep_checkpoints=10))
    assert [int(path.name[-2:]) for path in list_checkpoints(run / CHECKPOINTS)] == [2, 6, 8, 9]
    assert "not saved (No space left on device); kept: step-00000002; make room" in caplog.text
    assert not list((run / CHECKPOINTS).glob(".partial-*"))


def test_a_damaged_sample_is_survived_counted_and_repeated_by_a_resumed_run(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    offset = int(np.load(damaged / "index.npy")["offset"][3])
    with (damaged / "shard-000000.tar").open("r+b") as file:
        file.seek(offset + 300)
        file.write(b"\x00\x01\x02")
    config = tiny(shards, tmp_path / "whole")
    config = replace(config, data=replace(config.data, shards=str(damaged)))
    whole = train(config)
    (line,) = read_metrics(whole / METRICS_FILE)[-1:]
    assert line["samples_replaced"] >= 1
    rows = [json.loads(row) for row in (whole / FAULTS / "rank-00000.jsonl").read_text().splitlines()]
    assert {(row["failed_id"], row["kind"]) for row in rows} == {(3, "bytes")}

    cut = replace(config, out=tmp_path / "cut")
    train(cut)
    for checkpoint in list_checkpoints(cut.run_folder / CHECKPOINTS)[1:]:
        shutil.rmtree(checkpoint)
    # Mended meanwhile: the log decides.
    train(replace(cut, data=replace(config.data, shards=str(shards))), resume=True)
    assert_identical(final_state(whole), final_state(cut.run_folder))


def test_weights_that_are_not_finite_are_never_saved(shards: Path, tmp_path: Path) -> None:
    config = tiny(shards, tmp_path / "run")
    config = replace(config, log_every=100, optim=replace(config.optim, base_lr=1e30, clip_norm=0.0))
    with pytest.raises(CrispError, match="not finite"):
        train(config)
    for checkpoint in list_checkpoints(tmp_path / "run" / CHECKPOINTS):
        state = load_module_state(checkpoint, "student")
        assert all(value.isfinite().all() for value in state.values())


def test_a_loss_that_is_not_finite_stops_the_run(shards: Path, tmp_path: Path) -> None:
    config = tiny(shards, tmp_path / "run")
    with pytest.raises(CrispError, match="not finite"):
        train(replace(config, optim=replace(config.optim, base_lr=1e30, clip_norm=0.0)))


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (run / METRICS_FILE).exists() and any(line["step"] >= step for line in read_metrics(run / METRICS_FILE)):
            return
        if process.poll() is not None:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def _ranks(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of torchrun's workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_with_sigkill_and_resumed_it_ends_bit_for_bit_the_same(shards: Path, tmp_path: Path, ranks: int) -> None:
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*launch, "crisp", "train", *arguments], text=True, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(process: subprocess.Popen[str]) -> None:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err

    finish(start("demo", *as_arguments(tiny(shards, tmp_path / "whole"))))
    cut = tmp_path / "cut"
    process = start("demo", *as_arguments(tiny(shards, cut)))
    for step, delay_s in ((3, 0.0), (6, 0.013)):
        wait_for_step(cut, step, process)
        time.sleep(delay_s)
        victims = _ranks(process) if ranks > 1 else [process.pid]
        if victims:
            os.kill(victims[-1], signal.SIGKILL)
        process.communicate(timeout=300)
        process = start("--resume", str(cut))
    finish(process)
    assert_identical(final_state(cut), final_state(tmp_path / "whole"))
    assert json.loads((cut / "config.json").read_text())["seed"] == 0
