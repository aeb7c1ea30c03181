"""One optimiser step, as the paper tells it."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crisp.batch import Batch
from crisp.config import TrainConfig
from crisp.losses import LossTerms, TeacherStatistics, Temperatures
from crisp.models.student_teacher import StudentTeacher, TeacherProjections, masked_positions
from crisp.ops.regions import discover_and_warp
from crisp.optim import apply_schedule, clip_each_gradient, drop_gradients
from crisp.regions import visible_in_both
from crisp.schedules import StepSchedule
from crisp.training.state import TrainState

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """What a step tells: tensors on the device, read only when a line is logged."""

    terms: LossTerms
    """This rank's share"""
    regions: Tensor
    """[4] float32 sums over this rank's regions: regions, valid ones, patches in view 1, in view 2"""
    teacher: TeacherProjections | None = None
    """Of the last micro-batch, for `crisp.training.collapse`"""
    valid: Tensor | None = None
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
    return StepMetrics(terms=terms, regions=_region_sums(regions, batch), teacher=teacher, valid=valid)


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
