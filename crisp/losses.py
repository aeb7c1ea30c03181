"""The three losses of CRISP, their centres, and the global counts that they are divided by.

Every loss is a sum divided by a *global* count: of images, or of valid regions, over all ranks and micro-batches of
an optimiser step. So a rank's terms are its share of the step's loss: shares add up over ranks and micro-batches,
whatever the size of each. DistributedDataParallel averages gradients over ranks where a sum is meant: call
`(terms.total * world_size).backward()`.

The counts are known before any backward pass, since the teacher runs first for all micro-batches: see
`TeacherStatistics`, which also holds what the centres need. Axes as in `crisp.models.student_teacher`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crisp.config import LossConfig
from crisp.models.heads import Kind
from crisp.models.student_teacher import Projections, TeacherProjections
from crisp.ops.cross_entropy import prototype_cross_entropy


class Temperatures(NamedTuple):
    """Of the two softmaxes; all three losses use the same."""

    student: float
    teacher: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """Scalars on the device: this rank's share, for this micro-batch, of the step's losses (without λ)."""

    cls: Tensor
    patch: Tensor
    region: Tensor
    """0 without the region loss"""
    total: Tensor
    """cls + λ_patch · patch + λ_region · region; the one to differentiate"""

    def detach(self) -> "LossTerms":
        """The same numbers, without a graph."""
        return LossTerms(cls=self.cls, patch=self.patch, region=self.region, total=self.total.detach())

    def __add__(self, other: "LossTerms") -> "LossTerms":
        return LossTerms(
            cls=self.cls + other.cls,
            patch=self.patch + other.patch,
            region=self.region + other.region,
            total=self.total + other.total,
        )


@dataclass(frozen=True, slots=True)
class TeacherStatistics:
    """Sums of the teacher's bottlenecks per kind, and how many were summed: over one batch, a step, or all ranks.

    Logits are linear in bottlenecks, so these d numbers per kind give the mean of the P logits exactly.
    """

    packed: Tensor
    """[kinds, d + 1] (cls, patch and, with the region loss, region); the last column holds the counts"""

    @staticmethod
    def of(teacher: TeacherProjections, valid: Tensor | None) -> "TeacherStatistics":
        """Of one batch: both views' CLS tokens, *all* patches, and the regions [B, K] that are valid."""
        cls = teacher.cls.flatten(0, 1)
        rows = [_with_count(cls.sum(0), len(cls)), _with_count(teacher.patch_sum, teacher.patch_count)]
        if teacher.region is not None:
            assert valid is not None
            kept = torch.where(valid[..., None], teacher.region, 0)
            rows.append(torch.cat([kept.sum((0, 1, 2)), len(kept) * valid.sum().to(kept.dtype)[None]]))
        return TeacherStatistics(torch.stack(rows))

    @staticmethod
    def of_step(batches: Iterable["TeacherStatistics"]) -> "TeacherStatistics":
        """Of all micro-batches of a step on all ranks. Collective where torch.distributed is initialised."""
        packed = torch.stack([batch.packed for batch in batches]).sum(0)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(packed)
        return TeacherStatistics(packed)

    @property
    def images(self) -> Tensor:
        """Number of images, a scalar."""
        return self.packed[0, -1] / 2

    @property
    def regions(self) -> Tensor:
        """Number of valid regions, a scalar; each is seen in two views."""
        return self.packed[2, -1] / 2


class CrispLoss(nn.Module):
    """iBOT's CLS and patch losses and the region loss, with the centres of the teacher's logits as buffers.

    Args:
        config: weights λ, momentum of the centres.
        views: V, global and local.
        prototypes: P.
        region: with the region loss.
    """

    def __init__(self, config: LossConfig, *, views: int, prototypes: int, region: bool) -> None:
        super().__init__()
        self.config = config
        self.pairs = 2 * views - 2
        self.kinds: tuple[Kind, ...] = ("cls", "patch", "region") if region else ("cls", "patch")
        self.register_buffer("centers", torch.zeros(len(self.kinds), prototypes))
        self.centers: Tensor

    def of_local_views(
        self,
        student: Projections,
        teacher: TeacherProjections,
        *,
        statistics: TeacherStatistics,
        temperatures: Temperatures,
    ) -> LossTerms:
        """What a micro-batch's local views add to the CLS loss: each learns from both of the teacher's views.

        Args:
            student: of the local views.
            teacher: of the same images.
            statistics: of the step, over all ranks and micro-batches.
            temperatures: of this step.
        """
        weights = (1 / (self.pairs * statistics.images)).expand(student.cls.shape[1])
        cls = self._cross_entropy("cls", student, teacher, student.cls, teacher.cls, weights, temperatures)
        nothing = torch.zeros_like(cls)
        return LossTerms(cls=cls.detach(), patch=nothing.detach(), region=nothing.detach(), total=cls)

    def of_global_views(
        self,
        student: Projections,
        teacher: TeacherProjections,
        *,
        patch_masks: Tensor,
        masked: Tensor,
        valid: Tensor | None,
        statistics: TeacherStatistics,
        temperatures: Temperatures,
    ) -> LossTerms:
        """A micro-batch's share of the three losses in its global views, against the centres of the last step.

        Args:
            student, teacher: of the same views.
            patch_masks: [2, B, n] bool
            masked: [m] `masked_positions(patch_masks)`
            valid: [B, K] bool, the regions that both views show; None without the region loss.
            statistics: of the step, over all ranks and micro-batches.
            temperatures: of this step.
        """
        # A global view learns from the other global one.
        weights = (1 / (self.pairs * statistics.images)).expand(student.cls.shape[1])
        rows, targets = student.cls.flatten(0, 1)[None], teacher.cls.flip(0).flatten(0, 1)[None]
        cls = self._cross_entropy("cls", student, teacher, rows, targets, weights.repeat(2), temperatures)
        patch = self._patch_loss(student, teacher, patch_masks, masked, statistics, temperatures)
        region = torch.zeros_like(cls)
        if valid is not None:
            region = self._region_loss(student, teacher, valid, statistics, temperatures)
        total = cls + self.config.patch_weight * patch + self.config.region_weight * region
        return LossTerms(cls=cls.detach(), patch=patch.detach(), region=region.detach(), total=total)

    @torch.no_grad()
    def update_centers(
        self, statistics: TeacherStatistics, teacher_prototypes: dict[Kind, Tensor], *, skipped: Tensor | None = None
    ) -> None:
        """centre ← momentum · centre + (1 − momentum) · mean logits, unchanged where nothing was counted.

        Once per optimiser step, after its last loss, with the prototypes that the teacher had in it
        (`TeacherProjections.prototypes`): also when the teacher has been updated since.

        Args:
            statistics: of the step.
            teacher_prototypes: [P, d] per kind.
            skipped: bool scalar: leave all centres as they are (what was counted may not be finite).
        """
        sums, counts = statistics.packed[:, :-1], statistics.packed[:, -1:]
        means = sums / counts.clamp(min=1)  # [kinds, d]
        with torch.autocast(means.device.type, enabled=False):
            logits = torch.stack(
                [teacher_prototypes[kind] @ mean for kind, mean in zip(self.kinds, means, strict=True)]
            )
        moved = self.centers.lerp(logits, 1 - self.config.center_momentum)
        counted = counts > 0 if skipped is None else (counts > 0) & ~skipped
        self.centers.copy_(torch.where(counted, moved, self.centers))

    def _patch_loss(
        self,
        student: Projections,
        teacher: TeacherProjections,
        patch_masks: Tensor,
        masked: Tensor,
        statistics: TeacherStatistics,
        at: Temperatures,
    ) -> Tensor:
        """Masked patches against the teacher's of the same view: mean over a view's, then over 2 views, all images."""
        counts = patch_masks.sum(-1).flatten()  # [2·B]; an image without a masked patch has no row below
        view_counts = counts[masked // patch_masks.shape[-1]]  # [m]
        weights = 1 / (2 * statistics.images * view_counts)
        assert student.patch is not None
        assert teacher.patch is not None
        return self._cross_entropy("patch", student, teacher, student.patch[None], teacher.patch[None], weights, at)

    def _region_loss(
        self,
        student: Projections,
        teacher: TeacherProjections,
        valid: Tensor,
        statistics: TeacherStatistics,
        at: Temperatures,
    ) -> Tensor:
        """Eq. 6, symmetric: each view's region against the teacher's in the other view, mean over valid regions."""
        assert student.region is not None
        assert teacher.region is not None
        weights = valid.flatten() * (0.5 / statistics.regions.clamp(min=1))  # [B·K]
        rows, targets = student.region.flatten(0, 2)[None], teacher.region.flip(0).flatten(0, 2)[None]
        return self._cross_entropy("region", student, teacher, rows, targets, weights.repeat(2), at)

    def _cross_entropy(
        self,
        kind: Kind,
        student: Projections,
        teacher: TeacherProjections,
        rows: Tensor,
        targets: Tensor,
        weights: Tensor,
        at: Temperatures,
    ) -> Tensor:
        """`prototype_cross_entropy` of student rows [S, G, d] and teacher rows [T, G, d] with a kind's prototypes."""
        return prototype_cross_entropy(
            rows,
            student.prototypes[kind],
            targets,
            teacher.prototypes[kind],
            center=self.centers[self.kinds.index(kind)],
            weights=weights,
            student_temperature=at.student,
            teacher_temperature=at.teacher,
            fused=self.config.fused,
        )


def _with_count(total: Tensor, count: int) -> Tensor:
    return torch.cat([total, total.new_full((1,), count)])
