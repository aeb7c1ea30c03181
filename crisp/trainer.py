"""Pre-training: the step as the paper tells it, and the run around it.

Read `train_step` first; `train` is what surrounds it: resume, data, schedules, logging, checkpoints.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crisp.batch import Batch
from crisp.checkpoint import (
    list_checkpoints,
    load_newest,
    load_weights,
    remove_partial,
    save_checkpoint,
    set_aside_newer,
)
from crisp.config import TrainConfig
from crisp.distributed import World, sum_over_ranks, world_from_environment
from crisp.errors import CrispError
from crisp.interruption import interruption
from crisp.losses import CrispLoss, LossTerms, TeacherStatistics, Temperatures
from crisp.metrics import MetricsWriter
from crisp.models.initialise import InitReport, initialise
from crisp.models.student_teacher import StudentTeacher, build_student_teacher, masked_positions
from crisp.ops.regions import discover_and_warp, resolve_implementation
from crisp.optim import apply_schedule, build_optimizer, clip_each_gradient, drop_gradients
from crisp.pipelines.loader import TrainLoader, build_train_loader
from crisp.progress import TrainProgress
from crisp.regions import visible_in_both
from crisp.runs import CHECKPOINTS, FAULTS, check_free, create_run
from crisp.schedules import StepSchedule, schedule_at

log = logging.getLogger(__name__)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step reads and changes."""

    config: TrainConfig
    world: World
    networks: StudentTeacher
    student: nn.Module
    """`networks.student`, wrapped for several ranks"""
    loss: CrispLoss
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    init: InitReport | None = None
    """What was loaded from `config.init.weights`, if this run starts from them"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """What a step tells: tensors on the device, read only when a line is logged."""

    terms: LossTerms
    """This rank's share"""
    regions: Tensor
    """[4] float32 sums over this rank's regions: regions, valid ones, patches in view 1, in view 2"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewRegions:
    """The batch's regions, and where the two global views show them."""

    reference: Tensor
    """[B, K, N] bool"""
    masks: Tensor
    """[2, B, K, n] bool"""
    counts: Tensor
    """[2, B, K] int32"""
    valid: Tensor
    """[B, K] bool: seen in both views"""


def train_step(state: TrainState, batch: Batch, schedule: StepSchedule) -> StepMetrics:
    """One optimiser step (paper, section 3): the teacher first, then the student, then the teacher's average.

    Every rank calls it with its share of the global batch. On a GPU the host waits once, for the number of masked
    patches.
    """
    config, networks = state.config, state.networks
    apply_schedule(state.optimizer, schedule)
    masked = masked_positions(batch.patch_masks)
    with _autocast(state):
        # What the teacher sees: regions of the reference, and both global views unmasked.
        regions = find_regions(networks, batch, config) if config.region.enabled else None
        view_regions, valid = (regions.masks, regions.valid) if regions else (None, None)
        teacher = networks.teacher.teach(batch.global_views, masked=masked, view_regions=view_regions)
        statistics = TeacherStatistics.of_step([TeacherStatistics.of(teacher, valid)])

        # What the student makes of masked global views, local views and the same regions.
        student = state.student(
            batch.global_views,
            batch.local_views,
            patch_masks=batch.patch_masks,
            masked=masked,
            view_regions=view_regions,
        )
        terms = state.loss(
            student,
            teacher,
            patch_masks=batch.patch_masks,
            masked=masked,
            valid=valid,
            statistics=statistics,
            temperatures=Temperatures(config.loss.student_temperature, schedule.teacher_temperature),
        )

    # Terms are shares of a global sum, while DistributedDataParallel averages gradients over ranks.
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(terms.total * state.world.size).backward()
    state.scaler.unscale_(state.optimizer)
    if config.optim.clip_norm > 0:
        clip_each_gradient(networks.student.parameters(), config.optim.clip_norm)
    if schedule.last_layer_frozen:
        drop_gradients(networks.student.heads.last_layer.parameters())
    state.scaler.step(state.optimizer)
    state.scaler.update()

    state.loss.update_centers(statistics, teacher.prototypes)
    networks.update_teacher(schedule.ema_momentum)
    return StepMetrics(terms=terms, regions=_region_sums(regions, batch))


@torch.no_grad()
def find_regions(networks: StudentTeacher, batch: Batch, config: TrainConfig) -> ViewRegions:
    """Regions of the reference around the seeds, followed into both global views (paper, 3.1 and 3.2)."""
    warped = discover_and_warp(
        networks.teacher.discovery_tokens(batch.reference),
        batch.region_seed,
        batch.view_from_reference[:2],
        threshold=config.region.threshold,
        reference_grid=config.views.reference_grid,
        view_grid=config.views.global_grid,
        patch_px=config.views.patch_px,
        mode=config.region.warp_mode,
        min_coverage=config.region.min_coverage,
    )
    valid = visible_in_both(warped.view_regions, min_patches=config.region.min_patches)
    return ViewRegions(reference=warped.regions, masks=warped.view_regions, counts=warped.counts, valid=valid)


def _region_sums(regions: ViewRegions | None, batch: Batch) -> Tensor:
    if regions is None:
        return batch.view_from_reference.new_zeros(4)
    valid, counts = regions.valid, regions.counts
    return torch.stack([torch.ones_like(valid).sum(), valid.sum(), counts[0].sum(), counts[1].sum()]).float()


def _autocast(state: TrainState) -> contextlib.AbstractContextManager[Any]:
    precision = state.config.precision
    return torch.autocast(state.world.device.type, AUTOCAST[precision], enabled=precision != "fp32")


def build_state(config: TrainConfig, world: World, *, from_checkpoint: bool = False) -> TrainState:
    """Networks, loss and optimiser of a fresh run; weights depend on `config.seed` and `config.init` alone.

    Args:
        config: the run's.
        world: this rank's.
        from_checkpoint: a checkpoint will replace the weights, so `config.init` is not read (and may be gone).

    Raises:
        CrispError: a model that does not exist or does not fit, or initial weights that cannot be used.
    """
    torch.manual_seed(config.seed)
    networks = build_student_teacher(config, world.device)
    # Each rank reads them: DistributedDataParallel would send round the student's alone.
    init = initialise(networks, config.init) if config.init.weights and not from_checkpoint else None
    student: nn.Module = networks.student
    if world.size > 1:
        device_ids = [world.device.index] if world.device.type == "cuda" else None
        student = DistributedDataParallel(student, device_ids=device_ids, gradient_as_bucket_view=True)
    return TrainState(
        config=config,
        world=world,
        networks=networks,
        student=student,
        loss=CrispLoss(config.loss, prototypes=config.model.prototypes, region=config.region.enabled).to(world.device),
        optimizer=build_optimizer(networks.student, config.optim, device=world.device),
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16"),
        init=init,
    )


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
        first_step = _restore(state, loader, run) if resume else 0
        _check_agreement(world, run, first_step)
        _log_choices(config, world)
        _run_steps(state, loader, run, first_step)
        return run


def _run_steps(state: TrainState, loader: TrainLoader, run: Path, first_step: int) -> None:
    config, world = state.config, state.world
    steps = config.optim.epochs * loader.steps_per_epoch
    if first_step >= steps:
        log.info("%s: complete at step %d, nothing to do", run, first_step)
        return
    meter = _Meter(state, loader)
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
            # Stochastic depth draws from torch's generator; seeding each step leaves no state to save.
            torch.manual_seed(config.seed + (step + 1) * world.size + world.rank)
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
                _check_finite_weights(state, done)
                if world.is_main:
                    _save(state, loader, run, done, last=done == steps or stop)
            if stop and done < steps:
                log.info("stopped after step %d; continue with 'crisp train --resume %s'", done, run)
                break


class _Meter:
    """Sums metrics on the device between two logged lines, and times them."""

    def __init__(self, state: TrainState, loader: TrainLoader) -> None:
        self._state, self._loader = state, loader
        self._reset()

    def _reset(self) -> None:
        self._steps, self._wait_s, self._began_s = 0, 0.0, time.perf_counter()
        self._sums = torch.zeros(8, device=self._state.world.device)

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the time spent waiting for them counted."""
        while True:
            asked_s = time.perf_counter()
            batch = next(batches)
            self._wait_s += time.perf_counter() - asked_s
            yield batch

    def add(self, metrics: StepMetrics) -> None:
        """A step's metrics; nothing is read from the device."""
        terms = metrics.terms
        losses = torch.stack([terms.total.detach(), terms.cls, terms.patch, terms.region])
        self._sums += torch.cat([losses, metrics.regions])
        self._steps += 1

    def read(self, step: int, schedule: StepSchedule) -> dict[str, Any]:
        """Means since the last reading, over all ranks. Collective; waits for the device."""
        of_host = self._sums.new_tensor([self._wait_s, self._loader.replaced])
        sums = sum_over_ranks(torch.cat([self._sums, of_host])).tolist()
        elapsed_s = time.perf_counter() - self._began_s
        loss, cls, patch, region = (value / self._steps for value in sums[:4])
        regions, valid, patches_1, patches_2, wait_s, replaced = sums[4:]
        wait_s /= self._state.world.size
        values = {
            "step": step,
            "epoch": (step - 1) // self._loader.steps_per_epoch,
            "loss": loss,
            "loss_cls": cls,
            "loss_patch": patch,
            "loss_region": region,
            "region_valid_frac": valid / max(regions, 1),
            "regions_valid": valid / self._steps,
            "region_patches_view1": patches_1 / max(regions, 1),
            "region_patches_view2": patches_2 / max(regions, 1),
            "learning_rate": schedule.learning_rate,
            "weight_decay": schedule.weight_decay,
            "ema_momentum": schedule.ema_momentum,
            "teacher_temperature": schedule.teacher_temperature,
            "step_s": elapsed_s / self._steps,
            "images_per_s": self._steps * self._state.config.optim.global_batch / elapsed_s,
            "data_wait_s": wait_s / self._steps,
            "data_wait_share": wait_s / elapsed_s,
            "samples_replaced": int(replaced),
        }
        self._reset()
        return values


def _stop_if_not_finite(values: dict[str, Any]) -> None:
    terms = {name: values[name] for name in ("loss_cls", "loss_patch", "loss_region")}
    if not all(torch.isfinite(torch.tensor(list(terms.values())))):
        raise CrispError(
            f"step {values['step']}: the loss is not finite ({terms}); start a new run with a lower --optim.base-lr, "
            f"or with --precision bf16 or fp32"
        )


def _check_finite_weights(state: TrainState, step: int) -> None:
    """So that no checkpoint holds weights that cannot be resumed from. The weights are the same on all ranks."""
    norms = torch.stack(torch._foreach_norm([*state.networks.student.parameters()]))
    if not norms.isfinite().all():
        raise CrispError(
            f"step {step}: weights are not finite, so nothing is saved; start a new run with a lower --optim.base-lr, "
            f"or with --precision bf16 or fp32"
        )


def _save(state: TrainState, loader: TrainLoader, run: Path, step: int, *, last: bool) -> None:
    """Only the main rank: networks, centres and moments are the same on all.

    A checkpoint on the way that cannot be written is no reason to stop: there is an older one, and there may be room
    for the next.
    """
    content = {
        "step": step,
        "world_size": state.world.size,
        "data": loader.fingerprint,
        "student": state.networks.student.state_dict(),
        "teacher": state.networks.teacher.state_dict(),
        "loss": state.loss.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "loader": loader.state_dict(),
    }
    try:
        save_checkpoint(run / CHECKPOINTS, content, step=step, keep=state.config.keep_checkpoints)
    except CrispError as error:
        if last:
            raise
        log.error("%s; training goes on", error)


def _restore(state: TrainState, loader: TrainLoader, run: Path) -> int:
    """Load the newest checkpoint; returns the steps done. A run killed before its first one starts again."""
    folder = run / CHECKPOINTS
    if state.world.is_main:
        remove_partial(folder)
    newest = load_newest(folder)
    if newest is None:
        log.info("%s: no checkpoint yet, starting from step 0", run)
        return 0
    source, content = newest
    if state.world.is_main:
        set_aside_newer(folder, content["step"])
    if content["data"] != loader.fingerprint:
        raise CrispError(
            f"{state.config.data.shards}: not the data that {run} was trained on (the index differs); name the same "
            f"shards with --data.shards"
        )
    for name, module in (
        ("student", state.networks.student), ("teacher", state.networks.teacher), ("loss", state.loss),
    ):  # fmt: skip
        load_weights(module, content[name], source=f"{source} ({name})")
    state.optimizer.load_state_dict(content["optimizer"])
    state.scaler.load_state_dict(content["scaler"])
    loader.load_state_dict(content["loader"])
    if content["world_size"] != state.world.size:
        log.info(
            "resumed with %d ranks, written by %d: the same samples, weights equal up to rounding",
            state.world.size, content["world_size"],
        )  # fmt: skip
    log.info("resumed %s at step %d", source, content["step"])
    return int(content["step"])


def _check_agreement(world: World, run: Path, first_step: int) -> None:
    """Every rank must start at the same step: on several nodes each reads the checkpoints that it sees."""
    steps = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    steps[world.rank] = first_step
    if len(set(sum_over_ranks(steps).tolist())) > 1:
        raise CrispError(
            f"{run}: ranks see different checkpoints (they would start at steps {sorted(set(steps.tolist()))}); put "
            f"the run on a file system that all nodes share"
        )


def _log_choices(config: TrainConfig, world: World) -> None:
    if world.is_main:
        ops = resolve_implementation(world.device, mode=config.region.warp_mode)
        log.info("%d rank(s) on %s, precision %s, region ops %s", world.size, world.device, config.precision, ops)
