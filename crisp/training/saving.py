"""What a checkpoint of a run holds, and how a run goes on from one."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from crisp.checkpoint import (
    load_into,
    load_newest,
    remove_partial,
    save_checkpoint,
    set_aside_newer,
    stored_tensors,
)
from crisp.distributed import local_shards, sum_over_ranks
from crisp.errors import CrispError
from crisp.pipelines.loader import TrainLoader
from crisp.runs import CHECKPOINTS
from crisp.training.moments import empty_moments, load_moments, named_moments
from crisp.training.state import TrainState

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer"


def save(
    state: TrainState,
    loader: TrainLoader,
    run: Path,
    step: int,
    *,
    last: bool,
    doomed: Callable[[list[int]], list[int]],
) -> None:
    """Write a checkpoint. Collective: each rank writes its share.

    A checkpoint on the way that cannot be written is no reason to stop: there is an older one, and there may be room
    for the next. `doomed` says of the steps that have a checkpoint which ones to delete.
    """
    values = {
        "step": step,
        "world_size": state.world.size,
        "data": loader.fingerprint,
        "scaler": state.scaler.state_dict(),
        "loader": loader.state_dict(),
    }
    parts = {name: _tensors(module) for name, module in _modules(state).items()}
    parts[OPTIMIZER] = named_moments(state.optimizer, state.networks.student)
    _check_finite_weights(state, step)
    try:
        save_checkpoint(run / CHECKPOINTS, parts, values, step=step, doomed=doomed)
    except CrispError as error:
        if last:
            raise
        if state.world.is_main:
            log.error("%s; training goes on", error)


def restore(state: TrainState, loader: TrainLoader, run: Path) -> int:
    """Load the newest checkpoint; returns the steps done. Collective.

    A run killed before its first one starts again.
    """
    folder = run / CHECKPOINTS
    if state.world.is_main:
        remove_partial(folder)
    newest = load_newest(folder)
    if newest is None:
        log.info("%s: no checkpoint yet, starting from step 0", run)
        return 0
    values = newest.values
    if state.world.is_main:
        set_aside_newer(folder, values["step"])
    if values["data"] != loader.fingerprint:
        raise CrispError(
            f"{state.config.data.shards}: not the data that {run} was trained on (the index differs); name the same "
            f"shards with --data.shards"
        )
    for name, module in _modules(state).items():
        load_into(newest.path, name, _tensors(module))
    moments = empty_moments(state.networks.student, stored_tensors(newest.path, OPTIMIZER))
    load_into(newest.path, OPTIMIZER, moments)
    load_moments(state.optimizer, state.networks.student, moments)
    state.scaler.load_state_dict(values["scaler"])
    loader.load_state_dict(values["loader"])
    if values["world_size"] != state.world.size:
        log.info(
            "resumed with %d ranks, written by %d: the same samples, weights equal up to rounding",
            state.world.size, values["world_size"],
        )  # fmt: skip
    log.info("resumed %s at step %d", newest.path, values["step"])
    return int(values["step"])


def _modules(state: TrainState) -> dict[str, nn.Module]:
    return {"student": state.networks.student, "teacher": state.networks.teacher, "loss": state.loss}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors, not copies: what is loaded into them is loaded, and names of one tensor are seen so."""
    return module.state_dict(keep_vars=True)


def _check_finite_weights(state: TrainState, step: int) -> None:
    """So that no checkpoint holds weights that cannot be resumed from. Collective: a rank may hold shards alone."""
    norms = torch.stack(torch._foreach_norm(local_shards(state.networks.student.parameters())))
    if sum_over_ranks((~norms.isfinite()).sum()) > 0:
        raise CrispError(
            f"step {step}: weights are not finite, so nothing is saved; start a new run with a lower --optim.base-lr, "
            f"or with --precision bf16 or fp32"
        )
