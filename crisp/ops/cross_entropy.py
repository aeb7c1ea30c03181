"""Cross-entropy between the teacher's and the student's softmax over prototypes, without ever holding all logits.

A loss of thousands of tokens over 8192 prototypes is small to state and large to store: one matrix of logits for
the teacher, one for the student, and their gradients. Here rows are taken in chunks. Since the result is a scalar,
the gradients are accumulated in the same sweep and only scaled in the backward pass: nothing is computed twice, and
what is kept is the size of the bottlenecks and of the prototypes.

Axes: G groups (an image, a masked patch, a region), S students and T teachers per group, d bottleneck width,
P prototypes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK_ROWS = 256
"""Rows of student logits held at once: 8 MiB in float32 at 8192 prototypes, which still fits a CPU's cache."""


def prototype_cross_entropy(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    *,
    center: Tensor,
    weights: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Σ_g weights[g] · Σ_s Σ_t H(teacher t of group g, student s of group g).

    Targets are softmax((logits − centre) / teacher temperature), with logits = bottlenecks @ prototypes.T. Matrix
    products run in the autocast type where autocast is on; softmax and all sums in float32 (float64 if given it).

    Args:
        student: [S, G, d] l2-normalised bottlenecks; S and G may be 0.
        student_prototypes: [P, d]
        teacher: [T, G, d]; no gradient flows to it or to anything below.
        teacher_prototypes: [P, d]
        center: [P]
        weights: [G]
        student_temperature, teacher_temperature: positive.
        chunk_rows: rows of student logits held at once.

    Returns:
        A scalar, float32 or float64. Its gradients reach `student` and `student_prototypes`, once: the function
        is not twice differentiable.
    """
    loss: Tensor = _PrototypeCrossEntropy.apply(
        student,
        student_prototypes,
        teacher,
        teacher_prototypes,
        center,
        weights,
        student_temperature,
        teacher_temperature,
        max(1, chunk_rows // max(1, len(student))),
    )
    return loss


def prototype_cross_entropy_plain(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    *,
    center: Tensor,
    weights: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """The same as it would be written on paper, with all logits at once."""
    with torch.no_grad():
        targets = ((teacher @ teacher_prototypes.T - center) / teacher_temperature).softmax(-1)  # [T, G, P]
    log_probabilities = (student @ student_prototypes.T / student_temperature).log_softmax(-1)  # [S, G, P]
    cross_entropy = -torch.einsum("tgp,sgp->g", targets, log_probabilities)
    return (weights * cross_entropy).sum()


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_prototypes: Tensor,
        teacher: Tensor,
        teacher_prototypes: Tensor,
        center: Tensor,
        weights: Tensor,
        student_temperature: float,
        teacher_temperature: float,
        chunk_groups: int,
    ) -> Tensor:
        device = student.device.type
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
        sum_dtype = torch.promote_types(student.dtype, torch.float32)
        want_gradients = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]

        loss = torch.zeros((), dtype=sum_dtype, device=student.device)
        student_grad = torch.empty_like(student, dtype=sum_dtype)
        prototype_grad = torch.zeros_like(student_prototypes, dtype=sum_dtype)
        # Weights are of the order of 1 / batch, too small beside a float16 gradient: multiply the rows by weights
        # relative to the largest, and the result by the largest.
        largest = torch.cat([weights.abs(), weights.new_full((1,), torch.finfo(sum_dtype).tiny)]).amax()

        with torch.autocast(device, enabled=False):
            product_prototypes = student_prototypes.to(product_dtype)
            target_prototypes = teacher_prototypes.to(product_dtype)
            for start in range(0, student.shape[1], chunk_groups):
                chunk = slice(start, start + chunk_groups)
                weight = weights[chunk].to(sum_dtype)  # [g]

                rows = teacher[:, chunk].to(product_dtype)
                logits = (rows @ target_prototypes.T).to(sum_dtype)
                targets = ((logits - center) / teacher_temperature).softmax(-1).sum(0)  # [g, P]

                rows = student[:, chunk].to(product_dtype)
                logits = (rows @ product_prototypes.T).to(sum_dtype)
                log_probabilities = F.log_softmax(logits / student_temperature, dim=-1)  # [S, g, P]
                cross_entropy = torch.linalg.vecdot(targets, log_probabilities).sum(0).neg()  # [g]
                loss += torch.dot(weight, cross_entropy)

                if want_gradients:
                    # d cross_entropy / d logits, times the temperature
                    slope = log_probabilities.exp_().mul_(len(teacher)).sub_(targets).to(product_dtype)
                    student_grad[:, chunk] = (slope @ product_prototypes).to(sum_dtype) * weight[:, None]
                    weighted = (student[:, chunk] * (weight / largest)[:, None]).to(product_dtype)
                    prototype_grad += slope.flatten(0, 1).T @ weighted.flatten(0, 1)

        if want_gradients:
            student_grad /= student_temperature
            prototype_grad *= largest / student_temperature
            ctx.save_for_backward(student_grad, prototype_grad)
            ctx.dtypes = student.dtype, student_prototypes.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        student_grad, prototype_grad = ctx.saved_tensors
        student_dtype, prototype_dtype = ctx.dtypes
        return (
            (student_grad * loss_grad).to(student_dtype) if ctx.needs_input_grad[0] else None,
            (prototype_grad * loss_grad).to(prototype_dtype) if ctx.needs_input_grad[1] else None,
            *(None,) * 7,
        )
