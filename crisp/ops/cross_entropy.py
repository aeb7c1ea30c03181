"""Cross-entropy between the teacher's and the student's softmax over prototypes, without ever holding all logits.

A loss of thousands of tokens over 8192 prototypes is small to state and large to store: one matrix of logits for
the teacher, one for the student, and their gradients. Here rows are taken in chunks. Since the result is a scalar,
the gradients are accumulated in the same sweep and only scaled in the backward pass: nothing is computed twice, and
what is kept is the size of the bottlenecks and of the prototypes.

Axes: G groups (an image, a masked patch, a region), S students and T teachers per group, d bottleneck width,
P prototypes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from crisp.errors import CrispError
from crisp.ops.triton_support import require_triton

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
    fused: bool = False,
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
        fused: with Triton's kernels (`crisp.ops.cross_entropy_triton`), which hold no logits and take no float64.

    Returns:
        A scalar, float32 or float64. Its gradients reach `student` and `student_prototypes`, once: the function
        is not twice differentiable.

    Raises:
        CrispError: fused, where that cannot run.
    """
    if fused:
        check_fused(student.device, student.dtype)
    loss: Tensor = _PrototypeCrossEntropy.apply(
        student,
        student_prototypes,
        teacher,
        teacher_prototypes,
        center,
        weights,
        student_temperature,
        teacher_temperature,
        chunk_rows,
        fused,
        torch.is_grad_enabled(),  # a Function's forward cannot tell
    )
    return loss


def check_fused(device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Whether Triton's kernels can run on tensors of this device and type.

    Raises:
        CrispError: no.
    """
    if dtype == torch.float64:
        raise CrispError("loss.fused=True: its kernels take no float64; train in another precision, or leave it off")
    require_triton("loss.fused=True", device)


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


class Sweep(NamedTuple):
    """The loss, and its gradients where they are wanted."""

    loss: Tensor
    """A scalar"""
    student_gradient: Tensor | None
    """[S, G, d]"""
    prototype_gradient: Tensor | None
    """[P, d]"""


def sweep_chunks(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    *,
    center: Tensor,
    weights: Tensor,
    largest_weight: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    product_dtype: torch.dtype,
    gradients: bool,
    chunk_groups: int,
) -> Sweep:
    """One pass over the groups, `chunk_groups` at a time: the twin of `crisp.ops.cross_entropy_triton.sweep`.

    Args:
        largest_weight: scalar. Weights are of the order of 1 / batch, too small beside a float16 gradient: rows are
            multiplied by weights relative to it, and the result by it.
        product_dtype: of the matrix products; sums are in `student`'s, which is float32 or float64.
        gradients: whether they are wanted.
        others: as of `prototype_cross_entropy`.
    """
    sum_dtype = student.dtype
    loss = torch.zeros((), dtype=sum_dtype, device=student.device)
    student_gradient = torch.empty_like(student) if gradients else None
    prototype_gradient = torch.zeros_like(student_prototypes, dtype=sum_dtype) if gradients else None
    product_prototypes, target_prototypes = student_prototypes.to(product_dtype), teacher_prototypes.to(product_dtype)
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

        if student_gradient is not None and prototype_gradient is not None:
            # d cross_entropy / d logits, times the temperature
            slope = log_probabilities.exp_().mul_(len(teacher)).sub_(targets).to(product_dtype)
            student_gradient[:, chunk] = (slope @ product_prototypes).to(sum_dtype) * weight[:, None]
            weighted = (student[:, chunk] * (weight / largest_weight)[:, None]).to(product_dtype)
            prototype_gradient += slope.flatten(0, 1).T @ weighted.flatten(0, 1)
    if student_gradient is not None and prototype_gradient is not None:
        student_gradient /= student_temperature
        prototype_gradient *= largest_weight / student_temperature
    return Sweep(loss, student_gradient, prototype_gradient)


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
        chunk_rows: int,
        fused: bool,
        grad_enabled: bool,
    ) -> Tensor:
        device = student.device.type
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
        sum_dtype = torch.promote_types(student.dtype, torch.float32)
        want_gradients = grad_enabled and any(ctx.needs_input_grad)
        tiny = weights.new_full((1,), torch.finfo(sum_dtype).tiny, dtype=sum_dtype)
        arguments: dict[str, Any] = {
            "center": center,
            "weights": weights,
            "largest_weight": torch.cat([weights.abs().to(sum_dtype), tiny]).amax(),
            "student_temperature": student_temperature,
            "teacher_temperature": teacher_temperature,
            "product_dtype": product_dtype,
            "gradients": want_gradients,
        }
        tensors = (student.to(sum_dtype), student_prototypes, teacher, teacher_prototypes)
        with torch.autocast(device, enabled=False):
            if fused and student.numel():
                from crisp.ops import cross_entropy_triton  # where it is not asked for, Triton is never imported

                swept = Sweep(*cross_entropy_triton.sweep(*tensors, **arguments))
            else:
                swept = sweep_chunks(*tensors, chunk_groups=max(1, chunk_rows // max(1, len(student))), **arguments)

        if want_gradients:
            ctx.save_for_backward(swept.student_gradient, swept.prototype_gradient)
            ctx.dtypes = student.dtype, student_prototypes.dtype
        return swept.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        student_grad, prototype_grad = ctx.saved_tensors
        student_dtype, prototype_dtype = ctx.dtypes
        return (
            (student_grad * loss_grad).to(student_dtype) if ctx.needs_input_grad[0] else None,
            (prototype_grad * loss_grad).to(prototype_dtype) if ctx.needs_input_grad[1] else None,
            *(None,) * 9,
        )
