"""Whether two ranks train the run that one trains, started as a user starts them."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import torch

import crisp
from crisp.checkpoint import list_checkpoints, load_module_state
from crisp.doctor.check import Finding, Wrong
from crisp.doctor.config import Context, Device
from crisp.doctor.data_checks import SHARDS
from crisp.doctor.process import work_folder
from crisp.doctor.tiny import run_config
from crisp.metrics import METRICS_FILE, read_metrics
from crisp.runs import CHECKPOINTS, create_run
from crisp.trainer import train

LOSS_TOLERANCE: dict[Device, float] = {"cpu": 1e-5, "cuda": 1e-4}
"""Relative: ranks add in another order"""
WEIGHT_TOLERANCE: dict[Device, float] = {"cpu": 1e-5, "cuda": 1e-4}
"""Of the teacher: norm of the difference to norm"""

_PATIENCE_S = 200.0
_GRACE_S = 40.0


def torchrun(run: Path) -> list[str]:
    """Two ranks that take up a run, of which only the config is written yet."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "-m", "crisp", "train", "--resume", str(run)]


def gloo(context: Context) -> Finding:
    """Two processes of torchrun on the CPU."""
    return _two_against_one(context, "cpu")


def nccl(context: Context) -> Finding:
    """Two processes of torchrun, each on a GPU of its own."""
    return _two_against_one(context, "cuda")


def _two_against_one(context: Context, device: Device) -> Finding:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    folder = work_folder(context.folder, f"ranks-{device}")
    two = run_config(context.folder / SHARDS, folder / "two", device=device)
    create_run(two)
    _launch(torchrun(two.run_folder), device)
    alone = train(run_config(context.folder / SHARDS, folder / "one", device=device))
    ours, theirs = read_metrics(two.run_folder / METRICS_FILE), read_metrics(alone / METRICS_FILE)
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        raise Wrong(f"two ranks took {len(ours)} steps, one took {len(theirs)}")
    loss_apart = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=True))
    weights_apart = _apart(two.run_folder, alone)
    if not (loss_apart <= LOSS_TOLERANCE[device] and weights_apart <= WEIGHT_TOLERANCE[device]):
        raise Wrong(
            f"losses of two ranks are {loss_apart:.1e} off those of one (at most {LOSS_TOLERANCE[device]:g}), the "
            f"teacher {weights_apart:.1e} (at most {WEIGHT_TOLERANCE[device]:g})"
        )
    return Finding(
        figure=f"{len(ours)} steps: losses {loss_apart:.0e}, weights {weights_apart:.0e} off one rank's",
        values={"loss_relative": loss_apart, "weights_relative": weights_apart},
    )


def _launch(command: list[str], device: Device) -> None:
    places = [str(Path(crisp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    if device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1"}
    else:
        environment |= {"NVIDIA_TF32_OVERRIDE": "0"}
    # What they print goes where this process prints, and so into the report if they fail.
    process = subprocess.Popen(command, env=environment)
    try:
        status = process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        process.terminate()  # torchrun passes it on to the ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        process.kill()
        raise Wrong(f"two ranks did not end within {_PATIENCE_S:g} s") from error
    if status != 0:
        raise Wrong(f"torchrun ended with status {status}; what the ranks said is in the report")


def _apart(run: Path, other: Path) -> float:
    states = [load_module_state(list_checkpoints(folder / CHECKPOINTS)[-1], "teacher") for folder in (run, other)]
    ours, theirs = (torch.cat([state[name].double().flatten() for name in sorted(state)]) for state in states)
    return float((ours - theirs).norm() / theirs.norm())
