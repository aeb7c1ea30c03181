"""One optimiser step, as the paper tells it."""

import contextlib
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from crisp.batch import Batch
from crisp.config import Precision, TrainConfig
from crisp.losses import LossTerms, TeacherStatistics, Temperatures
from crisp.models.heads import Kind
from crisp.models.stochastic_depth import BlockRows, draw_kept, kept_rows
from crisp.models.student_teacher import StudentTeacher, TeacherProjections, masked_positions
from crisp.models.vit import VisionTransformer
from crisp.ops.regions import discover_and_warp
from crisp.optim import (
    apply_schedule,
    clip_each_gradient,
    drop_gradients,
    gradient_norms,
    gradients_of,
    take_step,
)
from crisp.regions import visible_in_both
from crisp.schedules import StepSchedule
from crisp.training.state import TrainState

CPU_ACTIVATIONS_MB = 640
"""What global views may keep for their backward pass on a CPU before a batch is taken in parts"""
KEPT_BYTES = 44
"""Per token, channel and block in bfloat16: residual stream 8, norms 4, q, k and v 8, attention 8, MLP 16"""
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """What a step tells: tensors on the device, read only when a line is logged."""

    terms: LossTerms
    """This rank's share"""
    regions: Tensor
    """[4] float32 sums over this rank's regions: regions, valid ones, patches in view 1, in view 2"""
    skipped: Tensor
    """bool: a gradient was not finite, on whatever rank, and the step changed nothing but the teacher's average"""
    gradient_norms: Tensor
    """[n] of each tensor that has a gradient, before clipping, in the order of `named_parameters`"""
    teacher: TeacherProjections
    """Of this rank's last micro-batch, for `crisp.training.collapse`"""
    valid: Tensor | None
    """[B, K] bool of that micro-batch; None without the region loss"""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """A micro-batch, and what the teacher makes of it."""

    batch: Batch
    patch_masks: Tensor
    """[2, B, n] bool, on the device"""
    masked: Tensor
    """[m] `masked_positions(patch_masks)`"""
    regions: ViewRegions | None
    """None without the region loss"""
    teacher: TeacherProjections
    kept: NDArray[np.bool_]
    """[depth, 2, V, B] which images pass through which branches of the student"""


def train_step(state: TrainState, batch: Batch, schedule: StepSchedule) -> StepMetrics:
    """One optimiser step (paper, section 3): the teacher first, then the student, then the teacher's average.

    Every rank calls it with its share of the global batch. The host never waits for the device. A step whose gradients
    are not finite is skipped, by all ranks alike.
    """
    config, networks = state.config, state.networks
    apply_schedule(state.optimizer, schedule)
    # Losses are divided by counts of the whole step: the teacher sees all micro-batches before the student's first.
    with autocast(state.config.precision, state.world.device):
        lessons: list[Lesson] = []
        for part, kept in micro_batches(state, batch, schedule.step):
            prototypes = lessons[0].teacher.prototypes if lessons else None  # the same in all of a step
            lessons.append(teach(state, part, kept, prototypes))
        valid = [lesson.regions.valid if lesson.regions else None for lesson in lessons]
        statistics = TeacherStatistics.of_step(
            TeacherStatistics.of(lesson.teacher, v) for lesson, v in zip(lessons, valid, strict=True)
        )

    state.optimizer.zero_grad(set_to_none=True)
    temperatures = Temperatures(config.loss.student_temperature, schedule.teacher_temperature)
    terms = []
    for number, lesson in enumerate(lessons, start=1):
        # Crop groups share nothing but parameters: one goes backward before the next goes forward, so that never more
        # than one group's activations are held. The last global views of a step touch every parameter, and it is
        # during their backward pass that ranks exchange gradients.
        if len(lesson.batch.local_views):
            with _exchange(state, False):
                terms.append(_learn_local(state, lesson, statistics, temperatures))
        with _exchange(state, number == len(lessons)):
            terms.append(_learn_global(state, lesson, statistics, temperatures))

    state.scaler.unscale_(state.optimizer)
    gradients = gradients_of(networks.student.parameters())
    norms = gradient_norms(gradients)
    skipped = ~norms.isfinite().all()
    if config.optim.clip_norm > 0:
        clip_each_gradient(gradients, norms, config.optim.clip_norm)
    if schedule.last_layer_frozen:
        drop_gradients(networks.student.heads.last_layer.parameters())
    take_step(state.optimizer, skipped=skipped)
    state.scaler.update()

    state.loss.update_centers(statistics, lessons[0].teacher.prototypes, skipped=skipped)
    networks.update_teacher(schedule.ema_momentum)
    return StepMetrics(
        terms=functools.reduce(operator.add, terms),
        regions=sum_regions(lessons),
        skipped=skipped,
        gradient_norms=norms,
        teacher=lessons[-1].teacher,
        valid=valid[-1],
    )


def micro_batches(state: TrainState, batch: Batch, step: int) -> list[tuple[Batch, NDArray[np.bool_]]]:
    """This rank's images in parts of at most `optim.micro_batch`, as many on every rank, with what each skips."""
    config, backbone = state.config, state.networks.student.backbone
    kept = draw_kept(backbone.drop_rates, seed=config.seed, step=step, slots=state.slots, views=config.views.views)
    largest_share = -(-config.optim.global_batch // state.world.size)
    at_once = config.optim.micro_batch or default_micro_batch(config, backbone, state.world.device, largest_share)
    parts = -(-largest_share // at_once)
    if parts == 1:
        return [(batch, kept)]
    return list(zip(batch.split(parts), np.array_split(kept, parts, axis=-1), strict=True))


def default_micro_batch(config: TrainConfig, backbone: VisionTransformer, device: torch.device, share: int) -> int:
    """Images that a rank of `share` images takes at once: all on a GPU, on a CPU what `CPU_ACTIVATIONS_MB` allows.

    A CPU is nearly as busy with a few images of a large model as with many (benchmarks/results/step.md); a tiny model
    on tiny images would lose time.
    """
    if device.type == "cuda":
        return share
    views = config.views
    tokens = 2 * (1 + (views.global_px // views.patch_px) ** 2)
    image_bytes = tokens * backbone.dim * len(backbone.blocks) * KEPT_BYTES
    return min(share, max(1, round(CPU_ACTIVATIONS_MB * 1e6 / image_bytes)))


@torch.no_grad()
def teach(
    state: TrainState, batch: Batch, kept: NDArray[np.bool_], prototypes: dict[Kind, Tensor] | None = None
) -> Lesson:
    """Regions of the reference, and the teacher's view of both global views, unmasked.

    `prototypes` are the teacher's, where an earlier micro-batch of the step has made them.
    """
    networks, device = state.networks, state.world.device
    masked = masked_positions(batch.patch_masks).to(device, non_blocking=True)
    regions = find_regions(networks, batch, state.config) if state.config.region.enabled else None
    view_regions = regions.masks if regions else None
    return Lesson(
        batch=batch,
        patch_masks=batch.patch_masks.to(device, non_blocking=True),
        masked=masked,
        regions=regions,
        teacher=networks.teacher.teach(
            batch.global_views, masked=masked, view_regions=view_regions, prototypes=prototypes
        ),
        kept=kept,
    )


def _learn_local(
    state: TrainState, lesson: Lesson, statistics: TeacherStatistics, temperatures: Temperatures
) -> LossTerms:
    """What the student makes of the local views, and the gradients of it."""
    views = lesson.batch.local_views
    with autocast(state.config.precision, state.world.device):
        student = state.student(views, rows=_rows(state, lesson.kept[:, :, 2:]))
        terms = state.loss.of_local_views(student, lesson.teacher, statistics=statistics, temperatures=temperatures)
    return _backward(state, terms)


def _learn_global(
    state: TrainState, lesson: Lesson, statistics: TeacherStatistics, temperatures: Temperatures
) -> LossTerms:
    """What the student makes of the masked global views and of their regions, and the gradients of it."""
    with autocast(state.config.precision, state.world.device):
        student = state.student(
            lesson.batch.global_views,
            patch_masks=lesson.patch_masks,
            masked=lesson.masked,
            view_regions=lesson.regions.masks if lesson.regions else None,
            rows=_rows(state, lesson.kept[:, :, :2]),
        )
        terms = state.loss.of_global_views(
            student,
            lesson.teacher,
            patch_masks=lesson.patch_masks,
            masked=lesson.masked,
            valid=lesson.regions.valid if lesson.regions else None,
            statistics=statistics,
            temperatures=temperatures,
        )
    return _backward(state, terms)


def _backward(state: TrainState, terms: LossTerms) -> LossTerms:
    # Terms are shares of a global sum, while DistributedDataParallel averages gradients over ranks.
    state.scaler.scale(terms.total * state.world.size).backward()
    return terms.detach()


def _rows(state: TrainState, kept: NDArray[np.bool_]) -> list[BlockRows | None]:
    return kept_rows(kept, state.networks.student.backbone.drop_rates, device=state.world.device)


def _exchange(state: TrainState, now: bool) -> contextlib.AbstractContextManager[Any]:
    """Whether the backward pass inside is the one in which ranks add up their gradients."""
    if isinstance(state.student, FSDPModule):
        state.student.set_requires_gradient_sync(now)
    elif isinstance(state.student, DistributedDataParallel) and not now:
        return state.student.no_sync()
    return contextlib.nullcontext()


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


def sum_regions(lessons: Sequence[Lesson]) -> Tensor:
    """See `StepMetrics.regions`."""
    sums = [lesson.teacher.cls.new_zeros(4) for lesson in lessons]
    for i, lesson in enumerate(lessons):
        if lesson.regions:
            valid, counts = lesson.regions.valid, lesson.regions.counts
            shown = [torch.ones_like(valid).sum(), valid.sum(), counts[0].sum(), counts[1].sum()]
            sums[i] = torch.stack(shown).float()
    return torch.stack(sums).sum(0)


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What forward passes run in."""
    return torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32")
