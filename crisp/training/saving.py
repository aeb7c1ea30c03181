"""What a checkpoint of a run holds, and how a run goes on from one."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from crisp.checkpoint import load_newest, load_weights, remove_partial, save_checkpoint, set_aside_newer
from crisp.errors import CrispError
from crisp.pipelines.loader import TrainLoader
from crisp.runs import CHECKPOINTS
from crisp.training.state import TrainState

log = logging.getLogger(__name__)


def save(
    state: TrainState,
    loader: TrainLoader,
    run: Path,
    step: int,
    *,
    last: bool,
    doomed: Callable[[list[int]], list[int]],
) -> None:
    """Called by every rank; the main one writes, since networks, centres and moments are the same on all.

    A checkpoint on the way that cannot be written is no reason to stop: there is an older one, and there may be room
    for the next. `doomed` says of the steps that have a checkpoint which ones to delete.
    """
    content = {
        "step": step,
        "world_size": state.world.size,
        "data": loader.fingerprint,
        "student": state.networks.student.state_dict(),
        "teacher": state.networks.teacher.state_dict(),
        "loss": state.loss.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "loader": loader.state_dict(),
    }
    _check_finite_weights(state, step)
    if not state.world.is_main:
        return
    try:
        save_checkpoint(run / CHECKPOINTS, content, step=step, doomed=doomed)
    except CrispError as error:
        if last:
            raise
        log.error("%s; training goes on", error)


def restore(state: TrainState, loader: TrainLoader, run: Path) -> int:
    """Load the newest checkpoint; returns the steps done. A run killed before its first one starts again."""
    folder = run / CHECKPOINTS
    if state.world.is_main:
        remove_partial(folder)
    newest = load_newest(folder)
    if newest is None:
        log.info("%s: no checkpoint yet, starting from step 0", run)
        return 0
    source, content = newest
    if state.world.is_main:
        set_aside_newer(folder, content["step"])
    if content["data"] != loader.fingerprint:
        raise CrispError(
            f"{state.config.data.shards}: not the data that {run} was trained on (the index differs); name the same "
            f"shards with --data.shards"
        )
    for name, module in (
        ("student", state.networks.student), ("teacher", state.networks.teacher), ("loss", state.loss),
    ):  # fmt: skip
        load_weights(module, content[name], source=f"{source} ({name})")
    state.optimizer.load_state_dict(content["optimizer"])
    state.scaler.load_state_dict(content["scaler"])
    loader.load_state_dict(content["loader"])
    if content["world_size"] != state.world.size:
        log.info(
            "resumed with %d ranks, written by %d: the same samples, weights equal up to rounding",
            state.world.size, content["world_size"],
        )  # fmt: skip
    log.info("resumed %s at step %d", source, content["step"])
    return int(content["step"])


def _check_finite_weights(state: TrainState, step: int) -> None:
    """So that no checkpoint holds weights that cannot be resumed from. The weights are the same on all ranks."""
    norms = torch.stack(torch._foreach_norm([*state.networks.student.parameters()]))
    if not norms.isfinite().all():
        raise CrispError(
            f"step {step}: weights are not finite, so nothing is saved; start a new run with a lower --optim.base-lr, "
            f"or with --precision bf16 or fp32"
        )
