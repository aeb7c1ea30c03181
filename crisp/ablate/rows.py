"""The rows of a table as runs: each one's config, folder, and the command that trains it."""

import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from crisp.ablate.config import AblateConfig
from crisp.ablations import TABLES
from crisp.config import TrainConfig
from crisp.errors import CrispError
from crisp.recipes import recipe_named
from crisp.run_state import is_alive, read_state
from crisp.runs import CONFIG_FILE, check_resumable, read_run_config

CRISP = (sys.executable, "-m", "crisp")
"""What commands begin with"""

DEMO_EPOCHS = 25
"""300 steps of the demo's recipe: long enough for the losses to fall"""
DEMO_DEPTH = 6
"""Blocks of the demo's model in the table of M, which averages up to six; two elsewhere"""
KNN_K = 10
"""As `crisp demo` has it"""
PAPER_HOURS_PER_EPOCH = 49 / 60
"""ViT-S/16 on four RTX 3090 (paper, A.3)"""
DEMO_MINUTES_PER_EPOCH = 3.5 / 100
"""Of the demo's recipe on two EPYC cores (`crisp.recipes.demo`)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of the table."""

    name: str
    change: Mapping[str, Any]
    """What it changes, by field (`region.threshold`); empty for the method's default"""
    run: Path
    recipe: str
    options: tuple[str, ...]
    """Of `crisp train RECIPE`"""
    free: tuple[str, ...]
    """Those of them that a run may be continued with"""
    config: TrainConfig
    """What they come to"""

    @property
    def evals(self) -> Path:
        """Where its results are."""
        return self.run / "evals"

    @property
    def log(self) -> Path:
        """What its commands print."""
        return self.run.parent / "logs" / f"{self.name}.log"

    def state(self) -> str:
        """new, begun or complete."""
        if not (self.run / CONFIG_FILE).exists():
            return "new"
        state = read_state(self.run)
        return "complete" if state is not None and state.state == "complete" else "begun"

    def train_command(self, *, gpus: int, extra: Sequence[str] = ()) -> list[str]:
        """What begins the run, or continues it.

        Args:
            gpus: that train it together; with several, torchrun starts a rank for each.
            extra: options that change no sample and no weight.
        """
        python, *crisp = CRISP
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        start = [python, *(several if gpus > 1 else []), *crisp, "train"]
        if self.state() == "new":
            return [*start, self.recipe, *self.options, *extra]
        return [*start, "--resume", str(self.run), *self.free, *extra]


def plan_rows(config: AblateConfig) -> list[Row]:
    """The rows that a config asks for, each checked against what is in its folder.

    Raises:
        CrispError: options that cannot work, a folder with another run, or a run that goes on right now.
    """
    rows = [_row(config, name) for name in TABLES[config.table] if not config.rows or name in config.rows]
    for row in rows:
        _check_folder(row)
    return rows


def demo_data(config: AblateConfig) -> Path:
    """Where the demo's images and shards lie, for all tables."""
    return config.root / "data"


def _row(config: AblateConfig, name: str) -> Row:
    change = {
        f"{part}.{field}": value
        for part, fields in TABLES[config.table][name].items()
        for field, value in fields.items()
    }
    run = config.folder / name
    common = {"out": run, "seed": config.seed, "device": config.device}
    given = {key: value for key, _, value in (option.partition("=") for option in config.train)}
    free = {"data.shards": config.shards, **given}
    if config.scale == "paper":
        recipe = f"ablation_{config.table}_{name}"
        fields: dict[str, Any] = {**common, "data.shards": config.shards}
        if config.init_weights != "none":
            fields["init.weights"] = config.init_weights
        if config.epochs is not None:
            fields |= _length(recipe, config.epochs)
    else:
        recipe = "demo"
        epochs = DEMO_EPOCHS if config.epochs is None else config.epochs
        shards = demo_data(config) / "shards"
        own = config.shards is None
        free["data.shards"] = str(shards / "train") if own else config.shards
        fields = {**common, "data.shards": free["data.shards"], **_length(recipe, epochs)}
        fields |= {"knn.every_epochs": epochs, "knn.k": KNN_K}
        if own:
            fields["knn.val_shards"] = str(shards / "test")
        if config.table == "layers":
            fields["model.depth"] = DEMO_DEPTH
        if config.init_weights not in (None, "none"):
            fields["init.weights"] = config.init_weights
        fields |= change
    options = (*_options(fields), *_options(given))
    return Row(
        name=name,
        change=change,
        run=run,
        recipe=recipe,
        options=options,
        free=_options(free),
        config=_parsed(recipe, options, row=name),
    )


def _length(recipe: str, epochs: int) -> dict[str, Any]:
    """A run of so many epochs, with a warm-up that is not longer."""
    return {"optim.epochs": epochs, "optim.warmup_epochs": min(recipe_named(recipe).optim.warmup_epochs, epochs)}


def _options(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields as the command line takes them."""
    options: list[str] = []
    for name, value in fields.items():
        dashed = name.replace("_", "-")
        if isinstance(value, bool):
            part, _, leaf = dashed.rpartition(".")
            options.append(f"--{part}.{leaf if value else f'no-{leaf}'}")
        else:
            options += [f"--{dashed}", *map(str, value if isinstance(value, tuple) else (value,))]
    return tuple(options)


def _parsed(recipe: str, options: Sequence[str], *, row: str) -> TrainConfig:
    """The config that `crisp train` makes of these options."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            return tyro.cli(TrainConfig, default=recipe_named(recipe), args=options, prog=f"crisp train {recipe}")
    except CrispError as error:
        raise CrispError(f"row {row}: {error}") from error
    except SystemExit as error:
        lines = [line.strip("│╭╮╰╯─ ") for line in told.getvalue().splitlines()]
        said = next((line for line in lines if ": " in line), " ".join(lines))  # below the title of tyro's box
        raise CrispError(f"row {row}: 'crisp train {recipe}' does not take its options: {said}") from error


def _check_folder(row: Row) -> None:
    if row.state() == "new":
        return
    try:
        check_resumable(read_run_config(row.run), row.config)
    except CrispError as error:
        raise CrispError(f"{row.run}: {error}; or give another folder with --out") from error
    state = read_state(row.run)
    if state is not None and state.state == "running" and state.host == os.uname().nodename and is_alive(state):
        raise CrispError(f"{row.run}: process {state.pid} trains it right now; wait, or end that process first")


def expected_hours(row: Row, *, scale: str) -> float:
    """What training a row takes: by the paper on four RTX 3090, or the demo's on two cores; 0 if it is complete."""
    if row.state() == "complete":
        return 0.0
    per_epoch = PAPER_HOURS_PER_EPOCH if scale == "paper" else DEMO_MINUTES_PER_EPOCH / 60
    # The demo's cost goes with its blocks; views and heads are the rest.
    deeper = (row.config.model.depth or 0) / 2 if scale == "demo" else 1.0
    return row.config.optim.epochs * per_epoch * deeper
