"""Checkpoints that are whole or absent: written aside, flushed to disk, then renamed into place.

RUN/checkpoints/step-00000100/state.pt          tensors and plain values, read with weights_only
RUN/checkpoints/step-00000100/checkpoint.json   step, size and SHA-256 of state.pt
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crisp.errors import CrispError

STATE_FILE = "state.pt"
SEAL_FILE = "checkpoint.json"
_STEP_PREFIX = "step-"
_PARTIAL_PREFIX = ".partial-"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the kernel write a file's (or a folder's) content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run's checkpoints folder, oldest first."""
    return sorted(p for p in folder.glob(f"{_STEP_PREFIX}*") if (p / SEAL_FILE).is_file())


def remove_partial(folder: Path) -> None:
    """Delete what a killed save or a killed deletion left behind."""
    for path in folder.glob(f"{_PARTIAL_PREFIX}*"):
        shutil.rmtree(path)


def save_checkpoint(folder: Path, state: dict[str, Any], *, step: int, keep: int) -> Path:
    """Write `state` as the checkpoint of `step` and keep the newest `keep`.

    At whatever moment the process dies, every folder named step-N is a whole checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    final = folder / f"{_STEP_PREFIX}{step:08d}"
    partial = folder / f"{_PARTIAL_PREFIX}{final.name}"
    partial.mkdir()
    torch.save(state, partial / STATE_FILE)
    seal = {
        "step": step,
        "bytes": (partial / STATE_FILE).stat().st_size,
        "sha256": _sha256(partial / STATE_FILE),
    }
    (partial / SEAL_FILE).write_text(json.dumps(seal) + "\n")
    for name in (STATE_FILE, SEAL_FILE):
        _flush(partial / name)
    _flush(partial)
    if final.exists():  # resumed from this very step and saved again
        _discard(final)
    partial.rename(final)
    _flush(folder)
    for old in list_checkpoints(folder)[:-keep]:
        _discard(old)
    return final


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint so that it never looks whole while half of it is gone."""
    doomed = checkpoint.with_name(f"{_PARTIAL_PREFIX}old-{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint folder, on the CPU, after its seal has been checked.

    Raises:
        CrispError: a file is missing, truncated or altered.
    """
    remedy = f"delete {checkpoint} to go on from the checkpoint before it"
    state_file = checkpoint / STATE_FILE
    if not state_file.is_file():
        raise CrispError(f"{state_file}: missing; {remedy}")
    try:
        seal = json.loads((checkpoint / SEAL_FILE).read_text())
        expected_bytes, expected_sha256 = seal["bytes"], seal["sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CrispError(f"{checkpoint / SEAL_FILE}: unreadable ({error!r}); {remedy}") from error
    size = state_file.stat().st_size
    if size != expected_bytes:
        raise CrispError(f"{state_file}: {size} bytes of {expected_bytes}, so truncated; {remedy}")
    if _sha256(state_file) != expected_sha256:
        raise CrispError(f"{state_file}: its SHA-256 is not that of {SEAL_FILE}, so altered; {remedy}")
    state: dict[str, Any] = torch.load(state_file, map_location="cpu", weights_only=True)
    return state


def load_weights(module: nn.Module, state: dict[str, Any], *, source: Path | str) -> None:
    """Load a module's state exactly, or say what differs.

    Raises:
        CrispError: keys or shapes are those of another architecture.
    """
    own = module.state_dict()
    differing = [
        f"{key} is {tuple(state[key].shape) if key in state else 'absent'} there and "
        f"{tuple(own[key].shape) if key in own else 'absent'} here"
        for key in sorted(own.keys() | state.keys())
        if key not in own or key not in state or own[key].shape != state[key].shape
    ]
    if differing:
        raise CrispError(
            f"{source}: a checkpoint of another architecture ({len(differing)} tensors differ; {differing[0]}); "
            f"give the model fields that it was trained with"
        )
    module.load_state_dict(state)
