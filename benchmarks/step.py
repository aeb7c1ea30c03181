"""What a training step costs, with and without regions, and how much faster than it the loader is.

    crisp bench step [--recipe vits16] [--batch 8] [--json FILE]
    crisp bench step --shards DIR …        with the loader's headroom            (or: python -m crisp.benchmarks.step)

A step is `crisp.training.step.train_step` on a batch that is already there: both networks, losses, backward pass,
optimiser and the teacher's average, nothing of the data pipeline. Each contender lives in a process of its own; they
take steps in pairs, in turns first and second, and one sleeps while the other works. Without shards the images are
noise, which costs the same. With shards, the loader is then measured alone: headroom = its samples/s ÷ the step's
images/s. `results/step.md` has figures.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from crisp.benchmarks.intervals import Interval, median_interval
from crisp.benchmarks.loader_rate import measure_loader
from crisp.benchmarks.machine import hardware
from crisp.benchmarks.report_file import check_report, write_report
from crisp.benchmarks.step_contenders import CONTENDERS
from crisp.benchmarks.step_worker import StepTime, StepWorker
from crisp.config import Precision, TrainConfig, to_json
from crisp.distributed import pick_device
from crisp.errors import CrispError
from crisp.pipelines.loader import open_shard_set
from crisp.process_settings import PRELOAD, environment_for_steps, environment_without_settings
from crisp.recipes import recipe_named

log = logging.getLogger(__name__)

_LOADER_ROUNDS = 5

IMAGENET_IMAGES = 1_281_167
PAPER_EPOCHS = {"crisp": (435.8, 49, 18.5), "ibot": (508.4, 42, 16.2)}
"""ViT-S/16, batch 256 (paper, appendix A.3): images/s of the four GPUs, minutes per epoch, GB per GPU"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBenchConfig:
    """Measure training steps."""

    recipe: str = "vits16"
    """Recipe whose step is measured."""
    batch: int = 8
    """Images per step, on one device."""
    precision: Precision = "bf16"
    """Autocast type."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes the GPU where there is one."""
    contenders: tuple[str, ...] = ("crisp", "ibot", "ibot-published")
    """crisp: the recipe; ibot: the recipe without regions; ibot-published: as iBOT's own code takes its step."""
    pairs: int = 20
    """Steps of each contender that count; every round each takes one."""
    warm_up: int = 2
    """Steps of each contender before those."""
    shards: str | None = None
    """Folder written by `crisp shard`: take the batch from there, and measure the loader too."""
    epoch: bool = False
    """Also print minutes per ImageNet epoch beside the paper's."""
    seconds: float = 4.0
    """Length of each of the loader's turns."""
    json: Path | None = None
    """Also write configuration, machine and results here."""

    def __post_init__(self) -> None:
        for name in ("batch", "pairs", "warm_up", "seconds"):
            value = getattr(self, name)
            if value <= 0:
                raise CrispError(f"{name}={value}: must be positive")
        if not self.contenders:
            raise CrispError(f"contenders: none given; choose from {', '.join(CONTENDERS)}")
        for name in self.contenders:
            if name not in CONTENDERS:
                raise CrispError(f"contenders: there is no {name!r}; choose from {', '.join(CONTENDERS)}")
            if self.contenders.count(name) > 1:
                raise CrispError(f"contenders: {name} is named twice; name it once")

    def train_config(self) -> TrainConfig:
        """The run whose step and loader are measured.

        Raises:
            CrispError: no such recipe.
        """
        recipe = recipe_named(self.recipe)
        return replace(
            recipe,
            device=self.device,
            precision=self.precision,
            data=replace(recipe.data, shards=self.shards, parts=1),  # one rank, so that any batch goes
            optim=replace(recipe.optim, global_batch=self.batch),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One contender."""

    name: str
    step_s: Interval
    """Median of its steps, by the clock"""
    cpu_s: Interval
    """Likewise, processor time"""
    images_per_s: float
    peak_gb: float
    """On a GPU, of all that torch allocates; on the CPU, of what the steps add to the process (`step_worker.Memory`)"""
    steps: list[StepTime]
    """Each, in order"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Two contenders in the steps of each pair."""

    name: str
    """As in 'crisp ÷ ibot'"""
    step_s: Interval
    cpu_s: Interval
    peak_gb: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Headroom:
    """The loader alone against the step of one contender."""

    renderer: str
    loader_samples_per_s: Interval
    step_images_per_s: float
    headroom: float
    """Loader ÷ step"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Everything of a run."""

    device: str
    results: list[StepResult]
    ratios: list[Ratio]
    """Of the first contender to each other one"""
    headroom: Headroom | None
    """Of the first contender"""


def bench_step(config: StepBenchConfig) -> Measured:
    """Pairs of steps, then the loader.

    Raises:
        CrispError: a recipe or shards that do not exist, a batch larger than the data, no GPU where one is asked for, a
            contender's process that fails.
    """
    run, device = config.train_config(), pick_device(config.device, 0)
    _check_shards(run)
    if device.type == "cpu" and config.precision == "bf16" and not has_bf16():
        log.warning(
            "precision=bf16: this processor has no instructions for it, so a step takes many times as long as "
            "with --precision fp32"
        )
    if device.type == "cpu":
        log.info("our contenders take memory from %s", environment_for_steps().get(PRELOAD) or "the C library")
    with contextlib.ExitStack() as living:
        workers = {
            name: living.enter_context(
                StepWorker(name, to_json(run), device=str(device), environment=_environment_of(name))
            )
            for name in config.contenders
        }
        taken = take_pairs(workers, pairs=config.pairs, warm_up=config.warm_up)
        peaks_gb = {name: worker.peak_gb() for name, worker in workers.items()}
    results = [summarise(name, steps, batch=config.batch, peak_gb=peaks_gb[name]) for name, steps in taken.items()]
    return Measured(
        device=str(device),
        results=results,
        ratios=[make_ratio(results[0], other) for other in results[1:]],
        headroom=None if config.shards is None else _measure_headroom(config, run, device, results[0]),
    )


def _environment_of(contender: str) -> dict[str, str]:
    """What its process starts with: our settings are part of our steps, and none of the published one."""
    return environment_without_settings() if contender == "ibot-published" else environment_for_steps()


def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 by itself; others than x86 are taken to."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return "avx2" not in flags or not flags.isdisjoint(("avx512_bf16", "amx_bf16"))


def _check_shards(run: TrainConfig) -> None:
    """What is wrong with the shards is said before minutes have gone."""
    if run.data.shards is None:
        return
    samples = len(open_shard_set(run))
    if samples < run.optim.global_batch:
        raise CrispError(
            f"batch={run.optim.global_batch}: {run.data.shards} has {samples} samples; take a smaller batch"
        )


def take_pairs(workers: Mapping[str, StepWorker], *, pairs: int, warm_up: int) -> dict[str, list[StepTime]]:
    """The steps of each contender: one of each per round, in an order that is turned round every time.

    Whatever a step leaves to the next one (warm caches, a warm processor) falls on both alike.
    """
    taken: dict[str, list[StepTime]] = {name: [] for name in workers}
    for number in range(-warm_up, pairs):
        names = list(workers)
        round_ = {name: workers[name].step() for name in (names if number % 2 == 0 else names[::-1])}
        said = ", ".join(f"{name} {step.step_s:.3g} s" for name, step in round_.items())
        log.info("%s: %s", f"pair {number + 1} of {pairs}" if number >= 0 else "warm-up", said)
        if number >= 0:
            for name, step in round_.items():
                taken[name].append(step)
    return taken


def summarise(name: str, steps: Sequence[StepTime], *, batch: int, peak_gb: float) -> StepResult:
    """A contender's steps as one result."""
    step_s = median_interval([step.step_s for step in steps])
    return StepResult(
        name=name,
        step_s=step_s,
        cpu_s=median_interval([step.cpu_s for step in steps]),
        images_per_s=batch / step_s.median,
        peak_gb=peak_gb,
        steps=list(steps),
    )


def make_ratio(one: StepResult, other: StepResult) -> Ratio:
    """One ÷ other, pair by pair: what slows the machine for a while slows both steps of a pair."""
    pairs = list(zip(one.steps, other.steps, strict=True))
    return Ratio(
        name=f"{one.name} ÷ {other.name}",
        step_s=median_interval([a.step_s / b.step_s for a, b in pairs]),
        cpu_s=median_interval([a.cpu_s / b.cpu_s for a, b in pairs]),
        peak_gb=one.peak_gb / other.peak_gb,
    )


def _measure_headroom(config: StepBenchConfig, run: TrainConfig, device: torch.device, result: StepResult) -> Headroom:
    turns = [measure_loader(run, device=device, seconds=config.seconds) for _ in range(_LOADER_ROUNDS)]
    rate = median_interval([turn.samples_per_s for turn in turns])
    return Headroom(
        renderer=turns[0].renderer,
        loader_samples_per_s=rate,
        step_images_per_s=result.images_per_s,
        headroom=rate.median / result.images_per_s,
    )


# --- the command line -----------------------------------------------------------------------------------------------


def results_table(measured: Measured) -> Table:
    """The contenders."""
    table = Table(title=f"training step on {measured.device}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("step, s", "interval", "CPU s", "interval", "images/s", "peak GB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in measured.results:
        step_s, cpu_s = result.step_s, result.cpu_s
        table.add_row(
            result.name,
            f"{step_s.median:.3g}",
            f"{step_s.low:.3g}–{step_s.high:.3g}",
            f"{cpu_s.median:.3g}",
            f"{cpu_s.low:.3g}–{cpu_s.high:.3g}",
            f"{result.images_per_s:.3g}",
            f"{result.peak_gb:.2f}",
        )
    return table


def ratios_table(measured: Measured) -> Table:
    """The first contender against each other one."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("ratio, pair by pair", no_wrap=True)
    for heading in ("step", "interval", "CPU", "interval", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for ratio in measured.ratios:
        figures = [f(interval) for interval in (ratio.step_s, ratio.cpu_s) for f in (_middle, _range)]
        table.add_row(ratio.name, *figures, f"{ratio.peak_gb:.2f}")
    return table


def epoch_table(measured: Measured) -> Table:
    """Minutes per epoch of ImageNet, with one device of this kind, beside the paper's table A.3."""
    table = Table(title="an epoch of ImageNet (1,281,167 images)", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("images/s", "minutes", "peak GB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in measured.results:
        minutes = IMAGENET_IMAGES / result.images_per_s / 60
        table.add_row(
            f"{result.name}, here, 1 × {measured.device}",
            f"{result.images_per_s:.4g}",
            f"{minutes:,.0f}",
            f"{result.peak_gb:.2f}",
        )
    for name, (images_per_s, minutes, peak_gb) in PAPER_EPOCHS.items():
        table.add_row(f"{name}, paper, 4 × RTX 3090", f"{images_per_s:.4g}", f"{minutes}", f"{peak_gb}")
    return table


def _middle(interval: Interval) -> str:
    return f"{interval.median:.2f}"


def _range(interval: Interval) -> str:
    return f"{interval.low:.2f}–{interval.high:.2f}"


def explain_headroom(headroom: Headroom, *, device: str) -> str:
    """The figure, and what it means on this device."""
    said = (
        f"headroom {headroom.headroom:.1f}: the loader alone delivers {headroom.loader_samples_per_s} samples/s "
        f"(renderer {headroom.renderer}), the step takes {headroom.step_images_per_s:.3g} images/s. Above 1 the loader "
        f"waits for training, below 1 training waits for the loader."
    )
    if device == "cpu":
        return (
            f"{said} On a CPU both share the cores, and each was measured with all of them: loading adds about "
            f"{1 / headroom.headroom:.1%} to a step."
        )
    if headroom.renderer == "dali-gpu":
        return f"{said} DALI had the GPU to itself: beside training, which needs it too, both are slower."
    return said


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(StepBenchConfig, args=args, prog="crisp bench step", description=__doc__)
    check_report(config.json)
    console = Console()
    about = hardware()  # before: the load is what others do
    measured = bench_step(config)
    console.print(results_table(measured))
    if measured.ratios:
        console.print(ratios_table(measured))
    if config.epoch:
        console.print(epoch_table(measured))
    interval = measured.results[0].step_s
    console.print(
        f"{config.recipe}, batch {config.batch}, {config.precision}; medians of {config.pairs} steps, which lie in the "
        f"interval with {interval.confidence:.1%} confidence; ratios are taken pair by pair.",
        highlight=False,
    )
    if measured.headroom is not None:
        console.print(explain_headroom(measured.headroom, device=measured.device), highlight=False)
    console.print(f"{date.today()}, {about}, torch threads {torch.get_num_threads()}", markup=False, highlight=False)
    write_report(
        config.json,
        config,
        hardware=about,
        measured={"torch_threads": torch.get_num_threads(), **dataclasses.asdict(measured)},
    )


if __name__ == "__main__":
    main()
