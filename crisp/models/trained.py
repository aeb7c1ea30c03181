"""A trained network and the config of its run, from the run's folder or from one of its checkpoints.

The one place that knows how a checkpoint holds networks: what looks at a trained model reads it through here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from crisp.checkpoint import load_module_state, load_newest, load_weights, step_of
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
    config, checkpoint = _find(path)
    state = load_module_state(checkpoint, which)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights, all of them replaced
        network = Network(config.model, config.region, config.views, drop_path=0.0)
    load_weights(network, state, source=f"{checkpoint} ({which})")
    network.eval().requires_grad_(False)
    return Trained(config=config, network=network, which=which, step=step_of(checkpoint), checkpoint=checkpoint)


def _find(path: Path) -> tuple[TrainConfig, Path]:
    """The run's config, and the checkpoint's folder."""
    if (path / CONFIG_FILE).is_file():
        config = read_run_config(path)
        newest = load_newest(path / CHECKPOINTS)
        if newest is None:
            raise CrispError(f"{path}: no checkpoint yet; go on with 'crisp train --resume {path}' until there is one")
        return config, newest.path
    folder = path.resolve()  # so that a link to a checkpoint leads to its run
    if not folder.is_dir():
        raise CrispError(f"{path}: no such folder; give a run that 'crisp train' wrote, or RUN/{CHECKPOINTS}/step-N")
    if folder.parent.name != CHECKPOINTS:
        raise CrispError(
            f"{path}: neither a run (it has no {CONFIG_FILE}) nor one of its checkpoints; give a run that "
            f"'crisp train' wrote, or RUN/{CHECKPOINTS}/step-N"
        )
    return read_run_config(folder.parent.parent), folder
