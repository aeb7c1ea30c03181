"""Checks called right here: those for a GPU with the CPU in its place, those of the machine with less of it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from crisp.doctor import data_checks, machine_checks, speed_checks, training_checks, twins
from crisp.doctor.check import NotHere, Wrong
from crisp.doctor.config import Context
from crisp.doctor.limits import MemoryBytes, cpu_limit, memory_bytes
from crisp.doctor.photographs import photograph, write_photographs
from crisp.doctor.tiny import TinyRun

GB = 10**9


# --- the machine ------------------------------------------------------------------------------------------------------


def test_a_container_has_what_its_group_allows(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\n")
    assert memory_bytes(meminfo=meminfo, cgroup=tmp_path) == MemoryBytes(total=16384000000, available=8192000000)
    assert cpu_limit(cgroup=tmp_path) is None
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert memory_bytes(meminfo=meminfo, cgroup=tmp_path) == MemoryBytes(total=4 * GB, available=3 * GB // 2)
    assert cpu_limit(cgroup=tmp_path) == 1.5
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert memory_bytes(meminfo=meminfo, cgroup=tmp_path).total == 16384000000
    assert cpu_limit(cgroup=tmp_path) is None


def test_too_little_of_anything_is_wrong(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "cpu_limit", lambda: 2.0)
    monkeypatch.setattr(machine_checks, "usable_cores", lambda: 64)
    with pytest.raises(Wrong, match="64 cores are visible, but the container may use 2:"):
        machine_checks.cores(context)
    monkeypatch.setattr(machine_checks, "memory_bytes", lambda: MemoryBytes(total=8 * GB, available=GB))
    with pytest.raises(Wrong, match=r"1\.0 GB are free, at least 4 are needed"):
        machine_checks.memory(context)
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 4096))
    with pytest.raises(Wrong, match="at most 256 files may be open"):
        machine_checks.open_files(context)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=64 * 10**6))
    with pytest.raises(Wrong, match=r"/dev/shm has 0\.06 GB free"):
        machine_checks.shared_memory(context)
    with pytest.raises(Wrong, match=r"0\.1 GB are free here, at least 3 are needed"):
        machine_checks.disk(context)
    assert not list(context.folder.iterdir())


def test_a_gpu_that_torch_does_not_see_is_wrong(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(machine_checks, "gpu_driver", lambda: "")
    with pytest.raises(NotHere, match="no CUDA device"):
        machine_checks.gpu(context)
    with pytest.raises(Wrong, match=r"torch sees no GPU: .*; the driver has: none"):
        machine_checks.gpu(replace(context, asked_device="cuda"))
    monkeypatch.setattr(machine_checks, "gpu_driver", lambda: "NVIDIA A100, 550.54, 40960 MiB")
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(Wrong, match="is built without CUDA; the driver has: NVIDIA A100"):
        machine_checks.gpu(context)
    with pytest.raises(NotHere, match="left out by --device cpu"):
        machine_checks.gpu(replace(context, asked_device="cpu"))


def test_other_random_numbers_are_wrong(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crisp.philox.uniforms", lambda *args, **options: np.zeros((50, 8)))
    with pytest.raises(Wrong, match="not those of numpy"):
        machine_checks.compiled_code(context)


# --- kernels ----------------------------------------------------------------------------------------------------------


INTERPRETED = """
from pathlib import Path
import torch
from crisp.doctor import training_checks, twins
from crisp.doctor.config import Context
from crisp.ops import cross_entropy_triton, regions_triton
twins.IMAGES, twins.GROUPS, twins.PROTOTYPES, training_checks.STEPS = 2, 20, 70, 1
del twins.FUSED_TOLERANCE[torch.bfloat16]  # the interpreter cannot multiply it
{broken}
context = Context(folder=Path('.'), report_folder=Path('.'), device='cpu', asked_device='auto')
print({check}(context).figure)
"""


def wrong(kernel: str, change: str) -> str:
    """Code that puts `change` (of its result `r`) behind a kernel's function."""
    return f"right = {kernel}\n{kernel} = lambda *a, **o: (lambda r: {change})(right(*a, **o))"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "broken", "said"),
    [
        ("twins.region_kernels", "", "equal in "),
        ("twins.fused_cross_entropy", "", "off by float32 "),
        ("training_checks.fused_steps", "", "1 steps: losses "),
        (
            "twins.region_kernels",
            wrong("regions_triton.warp_centre", "(r[0].roll(1, -1), r[1])"),
            "warped regions differ from the plain form's in",
        ),
        (
            "twins.fused_cross_entropy",
            wrong("cross_entropy_triton.sweep", "(r[0], 1.001 * r[1], r[2])"),
            "gradient of student in float32 is 1.0e-03 off the plain form, more than 0.0001",
        ),
    ],
)
def test_kernels_in_tritons_interpreter(check: str, broken: str, said: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED.format(check=check, broken=broken)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert (done.stdout if not broken else done.stderr.splitlines()[-1]).count(said) == 1, done.stderr


def test_wrong_warping_is_seen(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    right = twins.ops.warp

    def shifted(regions: Any, maps: Any, **options: Any) -> Any:
        return right(regions, maps + torch.tensor([[0, 0, 1.0], [0, 0, 0]]), **options)

    monkeypatch.setattr(twins.ops, "warp", shifted)
    with pytest.raises(Wrong, match="warped regions differ from the plain form's in"):
        twins.warp(context)


# --- data -------------------------------------------------------------------------------------------------------------


def test_photographs_are_the_same_wherever_they_are_made(tmp_path: Path) -> None:
    paths = [write_photographs(tmp_path / name, 3) for name in ("a", "b")]
    assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]
    assert 60_000 < np.mean([path.stat().st_size for path in paths[0]]) < 160_000
    pixels = photograph(40, 30, np.random.default_rng(0))
    assert pixels.shape == (30, 40, 3)
    assert pixels.std() > 10


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Context:
    folder = tmp_path_factory.mktemp("sharded")
    made = Context(folder=folder, report_folder=folder, device="cpu", asked_device="auto")
    data_checks.shards(made)
    return made


def test_batches_that_arrive_otherwise_are_seen(sharded: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_checks.loader_to_gpu(sharded).figure == "4 batches bit for bit"
    right = data_checks._batches
    asked = []

    def late(config: Any, device: Any, *, count: int, first_step: int = 0) -> Any:
        asked.append(first_step)
        yield from right(config, device, count=count, first_step=first_step + (len(asked) == 2))

    monkeypatch.setattr(data_checks, "_batches", late)
    with pytest.raises(Wrong, match="the batch of step 0 on the GPU: reference is another"):
        data_checks.loader_to_gpu(sharded)


def test_masks_belong_on_the_host(sharded: Context) -> None:
    batch = next(data_checks._batches(data_checks._config(sharded, renderer="cpu"), torch.device("cpu"), count=1))
    with pytest.raises(Wrong, match="reference lies on cpu, it belongs on cuda"):
        data_checks._require_placed(batch, torch.device("cuda"))
    moved = batch.to(torch.device("meta"))
    data_checks._require_placed(moved, torch.device("meta"))
    with pytest.raises(Wrong, match="patch_masks lies on meta, it belongs on cpu"):
        data_checks._require_placed(replace(moved, patch_masks=batch.patch_masks.to("meta")), torch.device("meta"))


def test_dali_is_wanted_where_there_is_a_gpu(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_checks, "dali_available", lambda: False)
    with pytest.raises(NotHere, match="DALI is not installed"):
        data_checks.dali_renderer(context)
    with pytest.raises(Wrong, match="DALI is not installed"):
        data_checks.dali_renderer(replace(context, device="cuda"))


# --- training ---------------------------------------------------------------------------------------------------------


def second_run_is_off(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Weights of every second run that is made are multiplied by 1 + `by`; one step shows it."""
    monkeypatch.setattr(training_checks, "STEPS", 1)
    made: list[TinyRun] = []
    build = TinyRun.__init__

    def built(self: TinyRun, *args: Any) -> None:
        build(self, *args)
        made.append(self)
        if len(made) % 2 == 0:
            with torch.no_grad():
                for parameter in self.state.networks.student.parameters():
                    parameter.mul_(1 + by)

    monkeypatch.setattr(TinyRun, "__init__", built)


def test_steps_of_two_devices_are_compared(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in place of the GPU."""
    found = training_checks.gpu_steps(context)
    assert found.values["loss_relative"] == 0
    second_run_is_off(monkeypatch, 3e-3)
    with pytest.raises(Wrong, match=r"after 1 float32 steps losses are .* off the CPU's \(at most 0\.0001\)"):
        training_checks.gpu_steps(context)


def test_steps_that_do_not_repeat_are_seen(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    second_run_is_off(monkeypatch, 1e-6)
    with pytest.raises(Wrong, match="two runs from one seed differ"):
        training_checks.steps_repeat(context)


@pytest.mark.parametrize(("by", "words"), [(float("nan"), "not finite"), (0.5, "the first loss is .* off float32's")])
def test_half_precision_that_is_off_is_seen(
    context: Context, monkeypatch: pytest.MonkeyPatch, by: float, words: str
) -> None:
    second_run_is_off(monkeypatch, by)
    with pytest.raises(Wrong, match=words):
        training_checks.bf16_steps(context)


def test_a_checkpoint_that_loads_otherwise_is_seen(sharded: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_checks, "STEPS", 1)
    right = training_checks.restore

    def off(state: Any, *args: Any) -> int:
        step = right(state, *args)
        with torch.no_grad():
            next(iter(state.networks.teacher.parameters())).add_(1e-6)
        return step

    monkeypatch.setattr(training_checks, "restore", off)
    with pytest.raises(Wrong, match=r"teacher\..* is not loaded as it was saved"):
        training_checks.checkpoint(sharded)


# --- speed ------------------------------------------------------------------------------------------------------------


def test_a_loader_that_is_slower_than_the_step_is_wrong_on_a_gpu(context: Context) -> None:
    values = {"loader speed": {"samples_per_s": 300.0}, "step speed": {"images_per_s": 400.0}}
    assert speed_checks.headroom(replace(context, values=values)).values == {"ratio": 0.75}
    with pytest.raises(Wrong, match=r"0\.75 times what the step takes: training waits for it"):
        speed_checks.headroom(replace(context, values=values, device="cuda"))
