"""The losses against their definitions, written with loops over all logits in float64."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from crisp.config import LossConfig
from crisp.losses import CrispLoss, LossTerms, TeacherStatistics, Temperatures
from crisp.models.student_teacher import Projections, TeacherProjections, masked_positions

IMAGES, VIEWS, K, PATCHES, DIM, PROTOTYPES = 5, 4, 2, 9, 8, 32
KINDS = ("cls", "patch", "region")
AT = Temperatures(student=0.1, teacher=0.05)


@dataclass
class Case:
    """One batch as the plain twin reads it: bottlenecks of *all* patches on both sides."""

    student: dict[str, Tensor]
    """cls [V, B, d], patch [2, B, n, d], region [2, B, K, d]"""
    teacher: dict[str, Tensor]
    """the same, cls [2, B, d]"""
    student_prototypes: dict[str, Tensor]
    teacher_prototypes: dict[str, Tensor]
    masks: Tensor
    valid: Tensor

    def images(self, chosen: slice) -> "Case":
        """Some of the images."""
        return replace(
            self,
            student={kind: x[:, chosen] for kind, x in self.student.items()},
            teacher={kind: x[:, chosen] for kind, x in self.teacher.items()},
            masks=self.masks[:, chosen],
            valid=self.valid[chosen],
        )

    def projections(self) -> tuple[Projections, TeacherProjections]:
        """As the networks give them: masked patches alone."""
        patches = self.teacher["patch"].flatten(0, 2)
        student = Projections(
            cls=self.student["cls"],
            patch=self.student["patch"][self.masks],
            region=self.student["region"],
            prototypes=self.student_prototypes,
        )
        teacher = TeacherProjections(
            cls=self.teacher["cls"],
            patch=self.teacher["patch"][self.masks],
            region=self.teacher["region"],
            prototypes=self.teacher_prototypes,
            patch_sum=patches.sum(0),
            patch_count=len(patches),
        )
        return student, teacher

    def leaves(self) -> list[Tensor]:
        """All that is to get gradients."""
        return [*self.student.values(), *self.student_prototypes.values()]


def make_case(*, views: int = VIEWS) -> Case:
    generator = torch.Generator().manual_seed(3)

    def rows(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, DIM, generator=generator, dtype=torch.float64), dim=-1)

    masks = torch.rand(2, IMAGES, PATCHES, generator=generator) < 0.4
    masks[0, 1] = False
    valid = torch.rand(IMAGES, K, generator=generator) < 0.5
    valid[0], valid[1] = True, False
    shapes = {"patch": (2, IMAGES, PATCHES), "region": (2, IMAGES, K)}
    return Case(
        student={kind: rows(*shape).requires_grad_() for kind, shape in ({"cls": (views, IMAGES)} | shapes).items()},
        teacher={kind: rows(*shape) for kind, shape in ({"cls": (2, IMAGES)} | shapes).items()},
        student_prototypes={kind: rows(PROTOTYPES).requires_grad_() for kind in KINDS},
        teacher_prototypes={kind: rows(PROTOTYPES) for kind in KINDS},
        masks=masks,
        valid=valid,
    )


def make_loss(*, views: int = VIEWS, **config: Any) -> CrispLoss:
    loss = CrispLoss(LossConfig(**config), views=views, prototypes=PROTOTYPES, region=True).double()
    loss.centers += 0.3 * torch.randn(loss.centers.shape, generator=torch.Generator().manual_seed(9))
    return loss


def plain_losses(case: Case, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cls, patch, region."""

    def cross_entropy(kind: str, teacher: Tensor, student: Tensor) -> Tensor:
        target_logits = case.teacher_prototypes[kind] @ teacher
        target = ((target_logits - centers[KINDS.index(kind)]) / AT.teacher).softmax(-1)
        return -(target * (case.student_prototypes[kind] @ student / AT.student).log_softmax(-1)).sum()

    images = case.masks.shape[1]
    student, teacher = case.student, case.teacher

    cls, pairs = torch.zeros((), dtype=torch.float64), 0
    for q in range(2):
        for v in range(len(student["cls"])):
            if v != q:
                pairs += 1
                for i in range(images):
                    cls = cls + cross_entropy("cls", teacher["cls"][q, i], student["cls"][v, i]) / images
    cls = cls / pairs

    patch = torch.zeros((), dtype=torch.float64)
    for v in range(2):
        for i in range(images):
            over_all = [
                case.masks[v, i, p] * cross_entropy("patch", teacher["patch"][v, i, p], student["patch"][v, i, p])
                for p in range(PATCHES)
            ]
            patch = patch + sum(over_all) / max(int(case.masks[v, i].sum()), 1) / images / 2

    region = torch.zeros((), dtype=torch.float64)
    for i, k in case.valid.nonzero().tolist():
        first_second = cross_entropy("region", teacher["region"][1, i, k], student["region"][0, i, k])
        second_first = cross_entropy("region", teacher["region"][0, i, k], student["region"][1, i, k])
        region = region + 0.5 * (first_second + second_first) / int(case.valid.sum())
    return cls, patch, region


def statistics_of(*cases: Case) -> TeacherStatistics:
    return TeacherStatistics.of_step(TeacherStatistics.of(c.projections()[1], c.valid) for c in cases)


def run(loss: CrispLoss, case: Case, statistics: TeacherStatistics | None = None) -> LossTerms:
    return losses_of(loss, *case.projections(), case, valid=case.valid, statistics=statistics or statistics_of(case))


def losses_of(
    loss: CrispLoss,
    student: Projections,
    teacher: TeacherProjections,
    case: Case,
    *,
    valid: Tensor | None,
    statistics: TeacherStatistics,
) -> LossTerms:
    """Of both crop groups together."""
    local = replace(student, cls=student.cls[2:], patch=None, region=None)
    return loss.of_local_views(local, teacher, statistics=statistics, temperatures=AT) + loss.of_global_views(
        replace(student, cls=student.cls[:2]),
        teacher,
        patch_masks=case.masks,
        masked=masked_positions(case.masks),
        valid=valid,
        statistics=statistics,
        temperatures=AT,
    )


@pytest.mark.parametrize("views", [VIEWS, 2, 12])
def test_losses_and_gradients_equal_the_plain_ones(views: int) -> None:
    case, loss = make_case(views=views), make_loss(views=views, patch_weight=0.7, region_weight=1.3)
    terms = run(loss, case)
    cls, patch, region = plain_losses(case, loss.centers)
    total = cls + 0.7 * patch + 1.3 * region
    got = [terms.cls, terms.patch, terms.region, terms.total]
    torch.testing.assert_close(got, [cls, patch, region, total], rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(terms.total, case.leaves())
    torch.testing.assert_close(gradients, torch.autograd.grad(total, case.leaves()), rtol=1e-10, atol=1e-13)


def test_twelve_views_are_22_pairs() -> None:
    """Equal cross-entropies everywhere, so that the mean over pairs is that value."""
    case = make_case(views=12)
    for tensors in (case.student, case.teacher):
        tensors["cls"] = torch.zeros_like(tensors["cls"])
    loss = CrispLoss(LossConfig(), views=12, prototypes=PROTOTYPES, region=True).double()
    torch.testing.assert_close(run(loss, case).cls, torch.tensor(PROTOTYPES).double().log())


def test_only_the_total_carries_a_graph() -> None:
    terms = run(make_loss(), make_case())
    assert [terms.cls.requires_grad, terms.patch.requires_grad, terms.region.requires_grad] == [False] * 3
    assert terms.total.requires_grad


def test_shares_of_micro_batches_add_up() -> None:
    case, loss = make_case(), make_loss()
    whole = run(loss, case)
    gradients = torch.autograd.grad(whole.total, case.leaves())
    parts = [case.images(slice(0, 2)), case.images(slice(2, 5))]
    statistics = statistics_of(*parts)
    shares = [run(loss, part, statistics) for part in parts]
    for name in ("cls", "patch", "region", "total"):
        torch.testing.assert_close(sum(getattr(share, name) for share in shares), getattr(whole, name))
    summed = torch.autograd.grad(sum(share.total for share in shares), case.leaves())
    torch.testing.assert_close(summed, gradients)


@pytest.mark.parametrize("what", ["masks", "valid"])
def test_nothing_to_learn_from_is_zero_and_finite(what: str) -> None:
    case, loss = make_case(), make_loss()
    case = replace(case, **{what: torch.zeros_like(getattr(case, what))})
    terms = run(loss, case)
    kind = {"masks": "patch", "valid": "region"}[what]
    assert getattr(terms, kind) == 0
    assert terms.total > 0
    terms.total.backward()
    for leaf in case.leaves():
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    for tensors in (case.student, case.student_prototypes):
        assert tensors[kind].grad.count_nonzero() == 0
        assert tensors["cls"].grad.count_nonzero() > 0


def test_invalid_regions_get_no_gradient() -> None:
    case = make_case()
    run(make_loss(), case).total.backward()
    moved = case.student["region"].grad.abs().sum(-1) > 0
    assert torch.equal(moved, case.valid.expand(2, -1, -1))


def test_without_the_region_loss() -> None:
    case = make_case()
    student, teacher = case.projections()
    student, teacher = replace(student, region=None), replace(teacher, region=None)
    loss = CrispLoss(LossConfig(), views=VIEWS, prototypes=PROTOTYPES, region=False).double()
    statistics = TeacherStatistics.of(teacher, None)
    terms = losses_of(loss, student, teacher, case, valid=None, statistics=statistics)
    cls, patch, _ = plain_losses(case, torch.zeros(3, PROTOTYPES))
    torch.testing.assert_close([terms.total, terms.region], [cls + patch, torch.zeros_like(cls)])
    loss.update_centers(statistics, case.teacher_prototypes)
    assert loss.centers.shape == (2, PROTOTYPES)


def test_statistics_count_images_and_regions() -> None:
    case = make_case()
    statistics = statistics_of(case.images(slice(0, 2)), case.images(slice(2, 5)))
    assert statistics.images == IMAGES
    assert statistics.regions == case.valid.sum()


def test_centres_are_the_moving_average_of_mean_logits() -> None:
    """Of all patches, masked or not, and of valid regions alone; started at 0, over several steps."""
    case = make_case()
    loss = CrispLoss(LossConfig(center_momentum=0.9), views=VIEWS, prototypes=PROTOTYPES, region=True).double()
    assert loss.centers.count_nonzero() == 0
    valid = case.valid.expand(2, -1, -1)
    logits = {kind: case.teacher[kind] @ case.teacher_prototypes[kind].T for kind in KINDS}
    means = [logits["cls"].mean((0, 1)), logits["patch"].mean((0, 1, 2)), logits["region"][valid].mean(0)]
    want = torch.zeros_like(loss.centers)
    for _ in range(3):
        loss.update_centers(statistics_of(case.images(slice(0, 3)), case.images(slice(3, 5))), case.teacher_prototypes)
        want = 0.9 * want + 0.1 * torch.stack(means)
        torch.testing.assert_close(loss.centers, want, rtol=0, atol=1e-14)


def test_the_region_centre_stays_when_no_region_is_valid() -> None:
    case, loss = make_case(), make_loss()
    before = loss.centers.clone()
    case.valid[:] = False
    case.teacher["region"][:] = 1e30  # whatever an empty region made
    loss.update_centers(statistics_of(case), case.teacher_prototypes)
    assert torch.equal(loss.centers[2], before[2])
    assert not torch.equal(loss.centers[:2], before[:2])


def test_the_loss_uses_the_old_centre() -> None:
    case, loss = make_case(), make_loss()
    old = plain_losses(case, loss.centers.clone())
    terms = run(loss, case)
    loss.update_centers(statistics_of(case), case.teacher_prototypes)
    torch.testing.assert_close(terms.cls, old[0])
    gradients = torch.autograd.grad(terms.total, case.leaves())  # also when the centre has moved since
    torch.testing.assert_close(gradients, torch.autograd.grad(sum(old), case.leaves()))


def test_a_skipped_step_leaves_all_centres() -> None:
    case, loss = make_case(), make_loss()
    before = loss.centers.clone()
    case.teacher["cls"][0, 0] = torch.nan
    loss.update_centers(statistics_of(case), case.teacher_prototypes, skipped=torch.tensor(True))
    assert torch.equal(loss.centers, before)
    loss.update_centers(statistics_of(make_case()), case.teacher_prototypes, skipped=torch.tensor(False))
    assert not torch.equal(loss.centers, before)


def test_centres_are_part_of_the_state() -> None:
    loss = make_loss()
    other = CrispLoss(LossConfig(), views=VIEWS, prototypes=PROTOTYPES, region=True).double()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.centers, loss.centers)


def test_autocast_is_near_and_centres_stay_full_precision() -> None:
    case, loss = make_case(), make_loss().float()
    for tensors in (case.student, case.teacher, case.student_prototypes, case.teacher_prototypes):
        for kind in KINDS:
            tensors[kind] = tensors[kind].detach().float()
    whole = run(loss, case)
    statistics = statistics_of(case)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(loss, case)
        loss.update_centers(statistics, case.teacher_prototypes)
    torch.testing.assert_close(half.total, whole.total, rtol=0.02, atol=0)
    twin = make_loss().float()
    twin.update_centers(statistics, case.teacher_prototypes)
    torch.testing.assert_close(loss.centers, twin.centers, rtol=0, atol=0)
