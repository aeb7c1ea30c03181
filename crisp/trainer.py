"""Pre-training: the run around the step: resume, data, schedules, logging, checkpoints.

`crisp.training.step.train_step` is what it repeats.
"""

import contextlib
import logging
from functools import partial
from pathlib import Path

from crisp.checkpoint import list_checkpoints
from crisp.config import TrainConfig
from crisp.distributed import World, world_from_environment
from crisp.interruption import interruption
from crisp.machine import note_start
from crisp.metrics import MetricsWriter
from crisp.ops.regions import resolve_implementation
from crisp.pipelines.loader import TrainLoader, build_train_loader
from crisp.process_settings import log_allocator
from crisp.progress import TrainProgress
from crisp.run_state import RecordedRun
from crisp.runs import CHECKPOINTS, FAULTS, check_free, create_run
from crisp.schedules import schedule_at
from crisp.training.collapse import CollapseWatch
from crisp.training.heartbeat import Heartbeat, collective_timeout
from crisp.training.liveness import Phase
from crisp.training.meter import Meter
from crisp.training.online_knn import OnlineKnn
from crisp.training.pictures import RunPictures
from crisp.training.retention import doomed
from crisp.training.saving import restore, save
from crisp.training.skipped import SkippedSteps
from crisp.training.state import TrainState, build_state
from crisp.training.step import train_step
from crisp.training.tracking import WandbSink, check_wandb

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
    check_wandb(config)
    with contextlib.ExitStack() as closing:
        world = closing.enter_context(
            world_from_environment(config.device, timeout=collective_timeout(config.rank_timeout_s))
        )
        heart = closing.enter_context(Heartbeat(world, timeout_s=config.rank_timeout_s))
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
        knn = OnlineKnn(config, world) if config.knn.every_epochs else None
        pictures = RunPictures(config, world) if config.pictures.every_epochs else None
        # A run that was killed before its first checkpoint starts again, from its initial weights.
        state = build_state(config, world, from_checkpoint=resume and bool(list_checkpoints(run / CHECKPOINTS)))
        if world.is_main and not resume:
            create_run(config)
        if world.is_main and state.init:
            state.init.log()
            state.init.write(run)
        first_step = restore(state, loader, run) if resume else 0
        if knn:
            knn.restore(run, first_step)
        if pictures and resume:
            pictures.restore(run, first_step)
        _log_choices(config, world)
        _run_steps(state, loader, run, first_step, heart=heart, knn=knn, pictures=pictures)
        return run


def _run_steps(
    state: TrainState, loader: TrainLoader, run: Path, first_step: int, *, heart: Heartbeat, knn: OnlineKnn | None,
    pictures: RunPictures | None,
) -> None:  # fmt: skip
    config, world = state.config, state.world
    per_epoch = loader.steps_per_epoch
    steps = config.optim.epochs * per_epoch
    if first_step >= steps:
        log.info("%s: complete at step %d, nothing to do", run, first_step)
        return
    meter, collapse, skipped = Meter(state, loader), CollapseWatch(config), SkippedSteps(state, run)
    kept = partial(
        doomed,
        scores=knn.scores if knn else {},
        keep_last=config.keep_checkpoints,
        keep_every=config.keep_every,
        keep_best=config.keep_best,
    )
    with contextlib.ExitStack() as closing:
        record = closing.enter_context(RecordedRun(run, steps=steps)) if world.is_main else None
        heart.before_exit(RecordedRun(run, steps=steps).failed)  # by any rank: the main one may be the one that hangs
        progress = closing.enter_context(TrainProgress(steps=steps, first_step=first_step, silent=not world.is_main))
        writer = None
        if world.is_main:
            note_start(run, step=first_step, ranks=world.size, nodes=world.nodes, device=world.device.type)
            sink = WandbSink(config, run) if config.wandb.project else None
            writer = MetricsWriter(run, from_step=first_step, sink=sink)
            closing.callback(writer.close)

        def measure_knn(done: int) -> None:
            assert knn is not None
            heart.mark(done - 1, Phase.EVALUATING, slow=True)
            with meter.paused():
                values = knn.measure(
                    state, run, step=done, epoch=(done - 1) // per_epoch, still_going=heart.still_going
                )
            if writer:
                writer.show(values)

        if knn and knn.due(first_step, steps_per_epoch=per_epoch, steps=steps) and first_step not in knn.scores:
            measure_knn(first_step)  # the process ended between that checkpoint and its measurement

        def draw_pictures(done: int) -> None:
            assert pictures is not None
            heart.mark(max(0, done - 1), Phase.EVALUATING, slow=True)
            with meter.paused():
                pictures.draw(state, run, step=done, steps_per_epoch=per_epoch, still_going=heart.still_going)

        if pictures and pictures.due(first_step, steps_per_epoch=per_epoch, steps=steps):
            draw_pictures(first_step)
        batches = meter.waiting(iter(loader))
        stopping = closing.enter_context(interruption(world))
        for step in range(first_step, steps):
            first = step == first_step
            heart.mark(step, Phase.WAITING_FOR_DATA, slow=first)
            batch = next(batches)
            heart.mark(step, Phase.TRAINING, slow=first)
            schedule = schedule_at(config, step=step, steps_per_epoch=per_epoch)
            metrics = train_step(state, batch, schedule)
            meter.add(metrics)
            skipped.add(step, metrics, batch)
            done = step + 1
            progress.advance(done)
            if done % config.log_every == 0 or done == steps:
                heart.mark(step, Phase.LOGGING, slow=first)
                values = meter.read(done, schedule)
                values |= skipped.look()
                if writer:
                    writer.write(values)
                    progress.show(values)
                    collapse.look(values)
            stop = stopping.stop_now()
            to_measure = knn is not None and knn.due(done, steps_per_epoch=per_epoch, steps=steps)
            if done % config.checkpoint_every == 0 or done == steps or stop or (to_measure and config.keep_best):
                heart.mark(step, Phase.SAVING, slow=True)
                save(state, loader, run, done, last=done == steps or stop, doomed=kept)
            if to_measure and not stop:  # a resumed run makes up for it
                measure_knn(done)
            if pictures and pictures.due(done, steps_per_epoch=per_epoch, steps=steps) and not stop:
                draw_pictures(done)
            if stop and done < steps:
                if record:
                    record.stopped(f"told to, after step {done}")
                log.info("stopped after step %d; continue with 'crisp train --resume %s'", done, run)
                break


def _log_choices(config: TrainConfig, world: World) -> None:
    if world.is_main:
        ops = resolve_implementation(world.device, mode=config.region.warp_mode)
        parallel = config.parallel if world.size > 1 else "alone"
        log.info(
            "%d rank(s) on %s, %s, precision %s, region ops %s",
            world.size, world.device, parallel, config.precision, ops,
        )  # fmt: skip
        if world.device.type == "cpu":
            log_allocator()
