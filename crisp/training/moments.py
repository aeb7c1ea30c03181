"""AdamW's state by parameter name, so that neither the order of groups nor sharding is part of a checkpoint."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def named_moments(optimizer: torch.optim.Optimizer, student: nn.Module) -> dict[str, Tensor]:
    """`exp_avg.NAME`, `exp_avg_sq.NAME` (as the parameter) and `step.NAME` ([] float32) of every parameter that moved.

    A parameter whose gradient was None in every step so far (a frozen last layer) has none.
    """
    return {
        f"{kind}.{name}": value
        for name, parameter in student.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def empty_moments(student: nn.Module, keys: Iterable[str]) -> dict[str, Tensor]:
    """Tensors to load those keys of `named_moments` into, sharded as the parameters are; unknown names are left out."""
    parameters = dict(student.named_parameters())
    moments = {}
    for key in keys:
        kind, _, name = key.partition(".")
        if name in parameters:
            moments[key] = torch.zeros(()) if kind == "step" else torch.zeros_like(parameters[name].detach())
    return moments


def load_moments(optimizer: torch.optim.Optimizer, student: nn.Module, moments: dict[str, Tensor]) -> None:
    """Continue with these moments; a parameter without any begins anew."""
    names = {parameter: name for name, parameter in student.named_parameters()}
    content = optimizer.state_dict()
    # The optimiser's own numbers: parameters counted through its groups.
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    content["state"] = {
        number: {kind: moments[f"{kind}.{names[parameter]}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
        for number, parameter in enumerate(ordered)
        if f"step.{names[parameter]}" in moments
    }
    optimizer.load_state_dict(content)
