"""Pre-training: the run around the step: resume, data, schedules, logging, checkpoints.

`crisp.training.step.train_step` is what it repeats.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch

from crisp.checkpoint import list_checkpoints
from crisp.config import TrainConfig
from crisp.distributed import World, world_from_environment
from crisp.errors import CrispError
from crisp.interruption import interruption
from crisp.metrics import MetricsWriter
from crisp.ops.regions import resolve_implementation
from crisp.pipelines.loader import TrainLoader, build_train_loader
from crisp.progress import TrainProgress
from crisp.runs import CHECKPOINTS, FAULTS, check_free, create_run
from crisp.schedules import schedule_at
from crisp.training.meter import Meter
from crisp.training.saving import restore, save
from crisp.training.state import TrainState, build_state
from crisp.training.step import train_step

log = logging.getLogger(__name__)


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train a recipe to its end, or continue a run from its newest checkpoint.

    Alone or, under torchrun, with other ranks. A resumed run ends with the weights of an undisturbed one: bit for
    bit in the same world on the CPU.

    Returns:
        The run's folder.

    Raises:
        CrispError: anything that the user can mend.
    """
    with world_from_environment(config.device) as world, contextlib.ExitStack() as closing:
        run = config.run_folder
        if not resume:
            check_free(run)  # on every rank, so that all leave together
        loader = build_train_loader(
            config,
            rank=world.rank,
            world_size=world.size,
            nodes=world.nodes,
            device=world.device,
            faults_folder=run / FAULTS,
        )
        closing.callback(loader.close)
        # A run that was killed before its first checkpoint starts again, from its initial weights.
        state = build_state(config, world, from_checkpoint=resume and bool(list_checkpoints(run / CHECKPOINTS)))
        if world.is_main and not resume:
            create_run(config)
        if world.is_main and state.init:
            state.init.log()
            state.init.write(run)
        first_step = restore(state, loader, run) if resume else 0
        _log_choices(config, world)
        _run_steps(state, loader, run, first_step)
        return run


def _run_steps(state: TrainState, loader: TrainLoader, run: Path, first_step: int) -> None:
    config, world = state.config, state.world
    steps = config.optim.epochs * loader.steps_per_epoch
    if first_step >= steps:
        log.info("%s: complete at step %d, nothing to do", run, first_step)
        return
    meter = Meter(state, loader)
    with contextlib.ExitStack() as closing:
        progress = closing.enter_context(TrainProgress(steps=steps, first_step=first_step, silent=not world.is_main))
        writer = MetricsWriter(run, from_step=first_step) if world.is_main else None
        if writer:
            closing.callback(writer.close)
        batches = meter.waiting(iter(loader))
        stopping = closing.enter_context(interruption(world))
        for step in range(first_step, steps):
            batch = next(batches)
            schedule = schedule_at(config, step=step, steps_per_epoch=loader.steps_per_epoch)
            meter.add(train_step(state, batch, schedule))
            done = step + 1
            progress.advance(done)
            if done % config.log_every == 0 or done == steps:
                values = meter.read(done, schedule)
                _stop_if_not_finite(values)
                if writer:
                    writer.write(values)
                    progress.show(values)
            stop = stopping.stop_now()
            if done % config.checkpoint_every == 0 or done == steps or stop:
                save(state, loader, run, done, last=done == steps or stop)
            if stop and done < steps:
                log.info("stopped after step %d; continue with 'crisp train --resume %s'", done, run)
                break


def _stop_if_not_finite(values: dict[str, Any]) -> None:
    terms = {name: values[name] for name in ("loss_cls", "loss_patch", "loss_region")}
    if not all(torch.isfinite(torch.tensor(list(terms.values())))):
        raise CrispError(
            f"step {values['step']}: the loss is not finite ({terms}); start a new run with a lower --optim.base-lr, "
            f"or with --precision bf16 or fp32"
        )


def _log_choices(config: TrainConfig, world: World) -> None:
    if world.is_main:
        ops = resolve_implementation(world.device, mode=config.region.warp_mode)
        parallel = config.parallel if world.size > 1 else "alone"
        log.info(
            "%d rank(s) on %s, %s, precision %s, region ops %s",
            world.size, world.device, parallel, config.precision, ops,
        )  # fmt: skip
