"""A trained network and the config of its run, from the run's folder or from one of its checkpoints.

The one place that knows how a checkpoint holds networks: what looks at a trained model reads it through here.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from crisp.checkpoint import load_checkpoint, load_newest, load_weights
from crisp.config import TrainConfig
from crisp.errors import CrispError
from crisp.models.student_teacher import Network
from crisp.runs import CHECKPOINTS, CONFIG_FILE, read_run_config

Which = Literal["teacher", "student"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """One network of a run as a checkpoint holds it."""

    config: TrainConfig
    """The run's"""
    network: Network
    """On the CPU, float32, in evaluation mode, without gradients"""
    which: Which
    step: int
    """Steps done when the checkpoint was written"""
    checkpoint: Path
    """The folder that it was read from"""


def load_trained(path: Path, *, which: Which = "teacher") -> Trained:
    """A network of a run; torch's random generator is left as it was.

    Args:
        path: a run's folder, for its newest whole checkpoint; or the folder of one checkpoint, RUN/checkpoints/step-N.
        which: of the run's two.

    Raises:
        CrispError: neither of the two, no checkpoint yet, a damaged one, or one of another architecture than the
            run's config says.
    """
    try:
        config, checkpoint, content = _read(path)
    except pickle.UnpicklingError as error:  # weights_only refuses what could run code
        raise CrispError(
            f"{path}: its checkpoint pickles something other than tensors and plain values, which could run code and "
            f"is not loaded; take one that 'crisp train' wrote"
        ) from error
    state, step = content.get(which), content.get("step")
    if not isinstance(step, int) or not _is_state_dict(state):
        raise CrispError(f"{checkpoint}: holds no {which}'s tensors, or no step; take one that 'crisp train' wrote")
    with torch.random.fork_rng(devices=[]):  # building draws initial weights, all of them replaced
        network = Network(config.model, config.region, config.views, drop_path=0.0)
    load_weights(network, state, source=f"{checkpoint} ({which})")
    network.eval().requires_grad_(False)
    return Trained(config=config, network=network, which=which, step=step, checkpoint=checkpoint)


def _is_state_dict(state: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(state, dict) and all(isinstance(tensor, Tensor) for tensor in state.values())


def _read(path: Path) -> tuple[TrainConfig, Path, dict[str, Any]]:
    """The run's config, the checkpoint's folder and its content."""
    if (path / CONFIG_FILE).is_file():
        config = read_run_config(path)
        newest = load_newest(path / CHECKPOINTS)
        if newest is None:
            raise CrispError(f"{path}: no checkpoint yet; go on with 'crisp train --resume {path}' until there is one")
        return config, *newest
    folder = path.resolve()  # so that a link to a checkpoint leads to its run
    if not folder.is_dir():
        raise CrispError(f"{path}: no such folder; give a run that 'crisp train' wrote, or RUN/{CHECKPOINTS}/step-N")
    if folder.parent.name != CHECKPOINTS:
        raise CrispError(
            f"{path}: neither a run (it has no {CONFIG_FILE}) nor one of its checkpoints; give a run that "
            f"'crisp train' wrote, or RUN/{CHECKPOINTS}/step-N"
        )
    return read_run_config(folder.parent.parent), path, load_checkpoint(path)
