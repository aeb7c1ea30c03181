"""Samples per second of our renderers, through the loader that training uses, against what others would use instead.

    crisp bench loader --shards DIR [--json FILE] [--picture PNG]      measure
    crisp bench loader --shards DIR --tune                             find settings for this machine

All make the same outputs of the same images: the reference, two global and ten local views. Backends take turns, so
that what else the machine does falls on all of them. A turn is a process of its own: it opens its loader, lets it run
until the prefetch is steady, and then counts. Ceilings take turns like the others: decoding alone, a loader with
nothing to render, and the parts of the CPU renderer one by one. Give it shards of photographs at their original size:
small images flatter whoever decodes slowly. `results/loader.md` has figures and what each change gave.
"""

import dataclasses
import logging
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console

from crisp.benchmarks.loader_backends import BACKENDS, check_shards, extract_images, why_missing
from crisp.benchmarks.loader_ceiling import Ceiling, Part, Scaling, make_ceiling, make_scaling
from crisp.benchmarks.loader_config import LoaderBenchConfig
from crisp.benchmarks.loader_turn import PARTS, Turn, take_parts_turn, take_turn
from crisp.benchmarks.machine import hardware
from crisp.benchmarks.report_file import check_report, write_report
from crisp.errors import CrispError

log = logging.getLogger(__name__)

PIL = ("torchvision-pil", "webdataset-pil")
"""The faster of these is what others are compared with: iBOT's recipe from a folder and from shards"""

_Contender = tuple[str, int]  # backend and threads


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One backend: medians over its turns, and the slowest and the fastest turn."""

    backend: str
    device: str
    """Where it renders, cpu or gpu"""
    threads: int
    """Or processes, of a DataLoader"""
    samples_per_s: float
    slowest: float
    fastest: float
    spread: float
    """(fastest − slowest) ÷ median"""
    rounds: list[float]
    """Samples per second of each round"""
    cpu_ms_per_sample: float
    cores_busy: float
    cpu_share: float
    """Of the cores that the benchmark may use"""
    cores_of_others: float
    """Kept busy by others meanwhile, in the turn that suffered most"""
    first_batch_s: float | None
    peak_mb: float
    """The largest of all turns"""
    peak_mb_per_thread: float
    """`peak_mb` ÷ `threads`"""
    processes: int
    gpu_mb: float
    times_pil: float | None
    """Rate ÷ that of the faster PIL loader"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A figure and what it should be."""

    name: str
    value: float
    per_round: float
    """Median of the figure taken within each round"""
    by_cpu: float | None
    """The same ratio by processor time, which hardly suffers from what else the machine does"""
    goal: float
    met: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Everything of a run."""

    results: list[Result]
    ceiling: Ceiling | None
    scaling: Scaling | None
    claims: list[Claim]
    skipped: dict[str, str]
    """Reason by backend"""


def bench_loader(config: LoaderBenchConfig) -> Measured:
    """Interleaved turns of every backend, in the order named.

    Raises:
        CrispError: shards that cannot be read, a batch larger than the data, no GPU, or a backend that was named and
            cannot be measured here; what a loader says.
    """
    chosen, skipped = choose_backends(config)
    with tempfile.TemporaryDirectory(prefix="crisp-bench-") as name:
        folder = None
        if any(BACKENDS[backend].reads_folder for backend in chosen):
            folder = extract_images(config.shards, Path(name), limit=config.folder_images)
        turns, parts = _interleave(config, chosen, folder)
    return _measured(config, turns, parts, skipped)


def choose_backends(config: LoaderBenchConfig) -> tuple[list[str], dict[str, str]]:
    """Backends to measure, and why others are left out.

    Raises:
        CrispError: shards that cannot be read, no GPU where one is asked for, a named backend that is missing.
    """
    check_shards(config.shards, batch=config.batch)
    if config.device == "gpu":
        check_gpu()
    chosen, skipped = [], {}
    for name in config.backends or BACKENDS:
        reason = why_missing(name, device=config.device, peers_python=config.peers_python)
        if reason is None:
            chosen.append(name)
        elif config.backends:
            raise CrispError(f"backend {name}: {reason}")
        else:
            skipped[name] = reason
    return chosen, skipped


def check_gpu() -> None:
    """Raise where there is none.

    Raises:
        CrispError: torch sees no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise CrispError("device=gpu: torch sees no GPU; run with --device cpu, or check the driver")


# --- turns ----------------------------------------------------------------------------------------------------------


def _interleave(
    config: LoaderBenchConfig, chosen: Sequence[str], folder: Path | None
) -> tuple[dict[_Contender, list[Turn]], list[dict[str, Part]]]:
    """Every round, each contender takes a turn; and the parts of the CPU renderer do."""
    threads, ours = config.used_threads, config.ceiling and config.device == "cpu" and "cpu" in chosen
    contenders = [(name, threads) for name in chosen]
    if ours and "decode-only" in chosen and threads > 1:
        contenders += [("cpu", 1), ("decode-only", 1)]
    turns: dict[_Contender, list[Turn]] = {contender: [] for contender in contenders}
    parts: list[dict[str, Part]] = []
    for number in range(1, config.rounds + 1):
        for (name, on_threads), done in turns.items():
            run = config.train_config(renderer="dali" if name == "dali" else "cpu", threads=on_threads)
            done.append(take_turn(config.spec(name, run, folder=folder), peers_python=config.peers_python))
            log.info(
                "round %d of %d: %s, %d threads: %.0f samples/s",
                number, config.rounds, name, on_threads, done[-1].samples_per_s,
            )  # fmt: skip
        if ours:
            parts.append(take_parts_turn(config.spec(PARTS, config.train_config())))
    return turns, parts


def _measured(
    config: LoaderBenchConfig,
    turns: dict[_Contender, list[Turn]],
    parts: list[dict[str, Part]],
    skipped: dict[str, str],
) -> Measured:
    threads = config.used_threads
    rounds = [
        Round(turns={who: done[i] for who, done in turns.items()}, parts=parts[i] if parts else {})
        for i in range(config.rounds)
    ]
    whole = Round(
        turns={who: _median(done) for who, done in turns.items()},
        parts={name: _median([round_[name] for round_ in parts]) for name in (parts[0] if parts else {})},
    )
    pil = max(
        (name for name in PIL if (name, threads) in turns),
        key=lambda name: whole.turns[name, threads].samples_per_s,
        default=None,
    )
    cpu, claims = ("cpu", threads), []
    if config.device == "cpu" and cpu in turns and pil is not None:
        faster = [r.turns[cpu].samples_per_s / r.turns[pil, threads].samples_per_s for r in (whole, *rounds)]
        by_cpu = whole.turns[pil, threads].cpu_ms_per_sample / whole.turns[cpu].cpu_ms_per_sample
        claims.append(_claim(f"cpu ÷ {pil}", faster, 6.0, by_cpu=by_cpu))
    ceiling = whole.ceiling(threads) if parts else None
    if ceiling is not None:
        shares = [r.ceiling(threads).share for r in (whole, *rounds)]
        claims.append(_claim("cpu ÷ the sum of its parts", shares, 0.75, by_cpu=ceiling.share_by_cpu))
    scaling = whole.scaling(threads) if ("decode-only", 1) in turns and threads > 1 else None
    if scaling is not None:
        ratios = [r.scaling(threads).ratio for r in (whole, *rounds)]
        claims.append(_claim(f"1→{threads} threads, cpu ÷ decode-only", ratios, 0.95, by_cpu=None))
    pil_per_s = None if pil is None else whole.turns[pil, threads].samples_per_s
    return Measured(
        results=[
            summarise(name, done, config, pil_per_s=pil_per_s)
            for (name, on_threads), done in turns.items()
            if on_threads == threads
        ],
        ceiling=ceiling,
        scaling=scaling,
        claims=claims,
        skipped=skipped,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What every contender and part reached in one round; or the medians over all."""

    turns: dict[_Contender, Turn]
    parts: dict[str, Part]

    def ceiling(self, threads: int) -> Ceiling:
        """Of the CPU renderer."""
        cpu = self.turns["cpu", threads]
        return make_ceiling(self.parts, samples_per_s=cpu.samples_per_s, cpu_ms_per_sample=cpu.cpu_ms_per_sample)

    def scaling(self, threads: int) -> Scaling:
        """From one thread to all."""
        cpu, decode_only = (
            (self.turns[name, 1].samples_per_s, self.turns[name, threads].samples_per_s)
            for name in ("cpu", "decode-only")
        )
        return make_scaling(threads=threads, cpu=cpu, decode_only=decode_only)


_Measurement = TypeVar("_Measurement", Turn, Part)


def _median(rounds: Sequence[_Measurement]) -> _Measurement:
    """Field by field; None where all are."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(rounds[0]):
        known = [value for each in rounds if (value := getattr(each, field.name)) is not None]
        values[field.name] = statistics.median(known) if known else None
    return type(rounds[0])(**values)


def _claim(name: str, figures: Sequence[float], goal: float, *, by_cpu: float | None) -> Claim:
    """`figures`: from the medians, then of each round."""
    value, *each = figures
    return Claim(name=name, value=value, per_round=statistics.median(each), by_cpu=by_cpu, goal=goal, met=value >= goal)


def summarise(backend: str, turns: Sequence[Turn], config: LoaderBenchConfig, *, pil_per_s: float | None) -> Result:
    """A backend's turns as one result."""
    rates = [turn.samples_per_s for turn in turns]
    rate, peak_mb = statistics.median(rates), max(turn.peak_mb for turn in turns)
    cores_busy = statistics.median(turn.cores_busy for turn in turns)
    first = [turn.first_batch_s for turn in turns if turn.first_batch_s is not None]
    threads = config.used_threads
    if backend in (*PIL, "torchvision-v2"):
        threads = config.workers or threads
    return Result(
        backend=backend,
        device="gpu" if config.device == "gpu" and BACKENDS[backend].on_gpu else "cpu",
        threads=threads,
        samples_per_s=rate,
        slowest=min(rates),
        fastest=max(rates),
        spread=(max(rates) - min(rates)) / rate,
        rounds=rates,
        cpu_ms_per_sample=statistics.median(turn.cpu_ms_per_sample for turn in turns),
        cores_busy=cores_busy,
        cpu_share=cores_busy / len(os.sched_getaffinity(0)),
        cores_of_others=max(turn.cores_of_others for turn in turns),
        first_batch_s=statistics.median(first) if first else None,
        peak_mb=peak_mb,
        peak_mb_per_thread=peak_mb / threads,
        processes=max(turn.processes for turn in turns),
        gpu_mb=max(turn.gpu_mb for turn in turns),
        times_pil=None if pil_per_s is None else rate / pil_per_s,
    )


# --- the command line -----------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(LoaderBenchConfig, args=args, prog="crisp bench loader", description=__doc__)
    check_report(config.json)
    console = Console()
    about = hardware()  # before: the load is what others do
    if config.tune:
        from crisp.benchmarks.loader_tune import print_tuned, tune_loader

        check_shards(config.shards, batch=config.batch)
        if config.device == "gpu":
            check_gpu()
        tuned = tune_loader(config)
        print_tuned(tuned, console)
        write_report(config.json, config, hardware=about, measured=dataclasses.asdict(tuned))
    else:
        from crisp.benchmarks.loader_table import print_measured

        if config.picture is not None:
            from crisp.viz.figure import new_figure

            new_figure(1, 1)  # what is missing for the picture is said now, not after minutes
        measured = bench_loader(config)
        print_measured(measured, console)
        if config.picture is not None:
            from crisp.benchmarks.loader_picture import draw_results

            draw_results(measured, config.picture, about=about)
        write_report(config.json, config, hardware=about, measured=dataclasses.asdict(measured))
    console.print(f"{date.today()}, {about}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
