"""AdamW's parameter groups, per-tensor clipping and the frozen last layer (iBOT's recipe)."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from crisp.config import OptimConfig
from crisp.distributed import local_shards
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
    """A step, or none, as a bool scalar on the device says: neither weights nor moments then change, nor the count.

    What `optimizer.step()` does, but on local tensors: of sharded ones, the optimiser would want the flag sharded too.
    """
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [_state_of(optimizer, parameter) for parameter in parameters]
        with torch.no_grad():
            adamw(
                local_shards(parameters),
                local_shards(p.grad for p in parameters),
                local_shards(state["exp_avg"] for state in states),
                local_shards(state["exp_avg_sq"] for state in states),
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=skipped.float(),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _state_of(optimizer: torch.optim.AdamW, parameter: nn.Parameter) -> dict[str, Tensor]:
    """A parameter's moments as AdamW keeps them, from 0 at its first gradient."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter.detach())
        state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
    return state


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
    """The norm [n] of each whole gradient, on the device, without a host sync.

    Where gradients are sharded, no rank has a whole one: the squared norms of all shards are added over the ranks in
    one all-reduce, so that per-tensor clipping costs one message of n numbers. Collective then.
    """
    norms = torch.stack(torch._foreach_norm(local_shards(gradients)))
    if isinstance(gradients[0], DTensor):
        squares = norms.square()
        dist.all_reduce(squares, group=gradients[0].device_mesh.get_group())
        norms = squares.sqrt()
    return norms


def clip_each_gradient(gradients: list[Tensor], norms: Tensor, max_norm: float) -> None:
    """Multiply each gradient by min(1, max_norm / (norm + 1e-6)), on the device, without a host sync.

    Args:
        gradients: n tensors.
        norms: [n] `gradient_norms(gradients)`
        max_norm: positive.
    """
    torch._foreach_mul_(local_shards(gradients), list((max_norm / (norms + 1e-6)).clamp(max=1.0).unbind()))


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set gradients to None, so that AdamW skips these parameters altogether (frozen last layers)."""
    for parameter in parameters:
        parameter.grad = None
