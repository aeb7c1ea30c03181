"""AdamW's parameter groups, per-tensor clipping and the frozen last layer (iBOT's recipe)."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crisp.config import OptimConfig
from crisp.distributed import local_shards
from crisp.schedules import StepSchedule


def build_optimizer(student: nn.Module, config: OptimConfig, *, device: torch.device) -> torch.optim.AdamW:
    """AdamW over two groups: decayed, and biases and 1-D parameters, which are not.

    Learning rate and weight decay are set by `apply_schedule` before each step.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    groups = [{"params": decayed, "decays": True}, {"params": plain, "decays": False, "weight_decay": 0.0}]
    # One fused kernel per group where there is one; on the CPU the foreach form gives the same sums.
    fused = device.type == "cuda"
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused, foreach=not fused)


def apply_schedule(optimizer: torch.optim.Optimizer, schedule: StepSchedule) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate
        if group["decays"]:
            group["weight_decay"] = schedule.weight_decay


def clip_each_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Multiply each tensor's gradient by min(1, max_norm / (norm + 1e-6)), on the device, without a host sync."""
    with_gradient = [p for p in parameters if p.grad is not None]
    if not with_gradient:
        return
    factors = (max_norm / (gradient_norms(with_gradient) + 1e-6)).clamp(max=1.0)
    gradients = local_shards(p.grad for p in with_gradient if p.grad is not None)
    torch._foreach_mul_(gradients, [*factors.unbind()])


def gradient_norms(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm [n] of each parameter's whole gradient, on its device; every parameter must have one.

    Where gradients are sharded, no rank has a whole one: the squared norms of all shards are added over the ranks in
    one all-reduce, so that per-tensor clipping costs one message of n numbers. Collective then.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(local_shards(gradients)))
    if isinstance(gradients[0], DTensor):
        squares = norms.square()
        dist.all_reduce(squares, group=gradients[0].device_mesh.get_group())
        norms = squares.sqrt()
    return norms


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set gradients to None, so that AdamW skips these parameters altogether (frozen last layers)."""
    for parameter in parameters:
        parameter.grad = None
