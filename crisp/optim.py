"""AdamW's parameter groups, per-tensor clipping and the frozen last layer (iBOT's recipe)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from crisp.config import OptimConfig
from crisp.schedules import StepSchedule


def build_optimizer(student: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over two groups: decayed, and biases and 1-D parameters, which are not.

    Learning rate and weight decay are set by `apply_schedule` before each step.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    groups = [{"params": decayed, "decays": True}, {"params": plain, "decays": False, "weight_decay": 0.0}]
    # Fused: one kernel for many tensors, which looks by itself, on the device, whether the step is to be skipped.
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def take_step(optimizer: torch.optim.AdamW, *, skipped: Tensor) -> None:
    """A step, or none, as a bool scalar on the device says: neither weights nor moments then change, nor the count."""
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined] # what GradScaler leaves there, too
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()


def apply_schedule(optimizer: torch.optim.Optimizer, schedule: StepSchedule) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate
        if group["decays"]:
            group["weight_decay"] = schedule.weight_decay


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Of those that have one."""
    return [p.grad for p in parameters if p.grad is not None]


def gradient_norms(gradients: list[Tensor]) -> Tensor:
    """[n] Euclidean norm of each, on the device, without a host sync."""
    return torch.stack(torch._foreach_norm(gradients))


def clip_each_gradient(gradients: list[Tensor], norms: Tensor, max_norm: float) -> None:
    """Multiply each gradient by min(1, max_norm / (norm + 1e-6)), on the device, without a host sync.

    Args:
        gradients: n tensors.
        norms: [n] `gradient_norms(gradients)`
        max_norm: positive.
    """
    torch._foreach_mul_(gradients, list((max_norm / (norms + 1e-6)).clamp(max=1.0).unbind()))


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set gradients to None, so that AdamW skips these parameters altogether (frozen last layers)."""
    for parameter in parameters:
        parameter.grad = None
