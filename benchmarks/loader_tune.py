"""The best settings of our renderer for this machine, found one at a time, in short turns.

For each setting in turn its values are measured, interleaved, with the others as they are; the best is kept. When a
pass over all settings has changed none of them, or after two passes, that is the result. Of values that are as good as
the best the first is taken: the smallest, or automatic. As good is who is not behind it by more than the best one's own
turns are apart, nor by more than a twentieth, which a disturbed turn would exceed.

The benchmark takes batches as fast as they come. A training step on the CPU shares its cores with the renderer, which
this does not show.
"""

import dataclasses
import json
import logging
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from crisp.benchmarks.loader_config import LoaderBenchConfig
from crisp.benchmarks.loader_turn import QUIET_CORES, take_turn
from crisp.config import TrainConfig
from crisp.shard_format import open_shards

log = logging.getLogger(__name__)

_PASSES = 2
_TIE = 0.05
_PREALLOCATE = ("data.dali.preallocate_width_px", "data.dali.preallocate_height_px")

Values = dict[str, Any]
"""Fields of a `TrainConfig` by dotted name"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is tried: the fields that belong together, and values for them from the smallest (or automatic) on."""

    name: str
    values: tuple[Values, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Values of all fields, and the samples per second of each turn with them."""

    values: Values
    rounds: tuple[float, ...]

    @property
    def samples_per_s(self) -> float:
        """Median of the turns."""
        return statistics.median(self.rounds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A setting whose values were compared."""

    setting: str
    trials: tuple[Trial, ...]
    chosen: int
    """Which of them"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What was tried, and what came out."""

    steps: list[Step]
    values: Values
    samples_per_s: float
    cores_of_others: float
    """Kept busy by other processes, in the turn that suffered most"""
    flags: str
    """For `crisp train`"""


def choose(trials: Sequence[Trial]) -> int:
    """The first that is as good as the best; see the module."""
    best = max(trials, key=lambda trial: trial.samples_per_s)
    enough = max(min(best.rounds), (1 - _TIE) * best.samples_per_s)
    return next(i for i, trial in enumerate(trials) if trial.samples_per_s >= enough)


def search(
    start: Values, settings: Sequence[Setting], measure: Callable[[list[Values]], list[tuple[float, ...]]]
) -> tuple[Values, list[Step]]:
    """Coordinate search; see the module.

    Args:
        start: of all fields.
        settings: in the order in which they are tried.
        measure: samples per second of each round for each of some values of all fields. Asked once for each.
    """
    known: dict[str, Trial] = {}
    now, steps = dict(start), list[Step]()

    def key(values: Values) -> str:
        return json.dumps(values, sort_keys=True)

    for _ in range(_PASSES):
        before = dict(now)
        for setting in settings:
            wanted = [now | values for values in setting.values]
            new = [values for values in wanted if key(values) not in known]
            for values, rounds in zip(new, measure(new) if new else [], strict=True):
                known[key(values)] = Trial(values=values, rounds=rounds)
            trials = tuple(known[key(values)] for values in wanted)
            chosen = choose(trials)
            if new or trials[chosen].values != now:  # else it is a step that was taken before
                steps.append(Step(setting=setting.name, trials=trials, chosen=chosen))
            now = dict(trials[chosen].values)
        if now == before:
            break
    return now, steps


def settings_for(config: LoaderBenchConfig) -> list[Setting]:
    """What is tried on this machine, for the device and the data at hand."""
    cores = len(os.sched_getaffinity(0))
    threads = sorted({max(1, cores // 2), max(1, cores * 3 // 4), cores, cores + 1, cores * 5 // 4})
    tried: dict[str, Sequence[Any]] = {
        "data.threads": threads,
        # Less than two would leave a training step nothing to take while a slow image is rendered.
        "data.prefetch_batches": (2, 3, 4),
    }
    if config.device == "cpu":
        tried["data.read_threads"] = (1, 2, 4, 8)
        return [_setting(name, values) for name, values in tried.items()]
    tried["data.dali.workers"] = (1, 2, 4)
    tried["data.dali.hardware_decoder_share"] = (0.0, 0.25, 0.5, 0.65, 0.75, 0.85, 1.0)
    sizes = [(0, 0), *_common_sizes(config.shards)]
    preallocate = tuple(dict(zip(_PREALLOCATE, size, strict=True)) for size in sizes)
    settings = [_setting(name, values) for name, values in tried.items()]
    return [*settings, Setting(name="data.dali.preallocate", values=preallocate)]


def _setting(name: str, values: Sequence[Any]) -> Setting:
    return Setting(name=name, values=tuple({name: value} for value in values))


def _common_sizes(shards: Path) -> list[tuple[int, int]]:
    """Width and height below which half and nine tenths of the images are."""
    _, index = open_shards(shards)
    rows = index[np.unique(np.linspace(0, len(index) - 1, min(len(index), 10_000)).astype(np.int64))]
    sides = [np.quantile(rows[side], (0.5, 0.9)) for side in ("width", "height")]
    return [(int(width), int(height)) for width, height in zip(*sides, strict=True)]


def tune_loader(config: LoaderBenchConfig) -> Tuned:
    """Search with turns of our renderer: the CPU renderer on the CPU, DALI on the GPU.

    Raises:
        CrispError: what the loader says.
    """
    settings = settings_for(config)
    backend = "cpu" if config.device == "cpu" else "dali"
    run = config.train_config(renderer="cpu" if config.device == "cpu" else "dali")

    cores_of_others = [0.0]

    def measure(wanted: list[Values]) -> list[tuple[float, ...]]:
        rounds: list[list[float]] = [[] for _ in wanted]
        for _ in range(config.rounds):
            for values, rates in zip(wanted, rounds, strict=True):
                turn = take_turn(config.spec(backend, with_values(run, values)))
                rates.append(turn.samples_per_s)
                cores_of_others.append(turn.cores_of_others)
                log.info("%s: %.0f samples/s", _text(values), rates[-1])
        return [tuple(rates) for rates in rounds]

    start = {name: _field(run, name) for setting in settings for values in setting.values for name in values}
    values, steps = search(start, settings, measure)
    reached = next(trial for step in steps for trial in step.trials if trial.values == values)
    return Tuned(
        steps=steps,
        values=values,
        samples_per_s=reached.samples_per_s,
        cores_of_others=max(cores_of_others),
        flags=flags(values, backend),
    )


def with_values(run: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The run with other fields, by dotted name."""
    for name, value in values.items():
        run = _replaced(run, name.split("."), value)
    return run


def _replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    first, *rest = path
    return dataclasses.replace(config, **{first: _replaced(getattr(config, first), rest, value) if rest else value})


def _field(run: TrainConfig, name: str) -> Any:
    value: Any = run
    for part in name.split("."):
        value = getattr(value, part)
    return value


def flags(values: Mapping[str, Any], renderer: str) -> str:
    """As `crisp train` takes them; what is automatic is left out."""
    chosen = {name: value for name, value in values.items() if name not in _PREALLOCATE or value}
    options = {"data.renderer": renderer} | chosen
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.removeprefix('data.')} {value}" for name, value in values.items())


def print_tuned(tuned: Tuned, console: Console) -> None:
    """What was tried, and the flags."""
    table = Table(title="settings, one at a time")
    table.add_column("setting", no_wrap=True)
    for heading in ("value", "samples/s", "range", "kept"):
        table.add_column(heading, justify="right")
    for step in tuned.steps:
        own = [name for name in step.trials[0].values if name.startswith(step.setting)]
        for i, trial in enumerate(step.trials):
            table.add_row(
                step.setting if i == 0 else "",
                " × ".join(str(trial.values[name]) for name in own),
                f"{trial.samples_per_s:.0f}",
                f"{min(trial.rounds):.0f}–{max(trial.rounds):.0f}",
                "yes" if i == step.chosen else "",
                end_section=i == len(step.trials) - 1,
            )
    console.print(table)
    if tuned.cores_of_others > QUIET_CORES:
        console.print(f"other processes took up to {tuned.cores_of_others:.1f} cores: do it again on a quiet machine")
    console.print(f"for crisp train ({tuned.samples_per_s:.0f} samples/s):", highlight=False)
    console.print(tuned.flags, markup=False, highlight=False, soft_wrap=True)
