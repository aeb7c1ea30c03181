"""Checkpoints that are whole or absent: written aside, flushed to disk, then renamed into place.

RUN/checkpoints/step-00000100/state.pt          tensors and plain values, read with weights_only
RUN/checkpoints/step-00000100/checkpoint.json   step, size and SHA-256 of state.pt
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crisp.errors import CrispError

log = logging.getLogger(__name__)

STATE_FILE = "state.pt"
SEAL_FILE = "checkpoint.json"
_STEP_PREFIX = "step-"
_PARTIAL_PREFIX = ".partial-"
_DAMAGED_PREFIX = ".damaged-"


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


def save_checkpoint(
    folder: Path, state: dict[str, Any], *, step: int, doomed: Callable[[list[int]], list[int]]
) -> Path:
    """Write `state` as the checkpoint of `step`, then delete those of the steps that `doomed` picks from all there are.

    At whatever moment the process dies, every folder named step-N is a whole checkpoint.

    Raises:
        CrispError: it cannot be written (a full disk, for one); the checkpoints that were there still are.
    """
    final = folder / f"{_STEP_PREFIX}{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        _write(final, state, step)
        found = {int(path.name.removeprefix(_STEP_PREFIX)): path for path in list_checkpoints(folder)}
        for old in doomed(list(found)):
            _discard(found[old])
    except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError for what the system refuses
        with contextlib.suppress(OSError):
            remove_partial(folder)
        kept = ", ".join(path.name for path in list_checkpoints(folder)) or "none"
        raise CrispError(
            f"{final}: not saved ({_reason(error)}); kept: {kept}; make room, or choose another folder with --out"
        ) from error
    return final


def _reason(error: OSError | RuntimeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error).splitlines()[0]


def _write(final: Path, state: dict[str, Any], step: int) -> None:
    folder = final.parent
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


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint so that it never looks whole while half of it is gone."""
    doomed = checkpoint.with_name(f"{_PARTIAL_PREFIX}old-{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; None where none was ever written.

    Damaged ones are passed over, with a warning.

    Raises:
        CrispError: there are checkpoints, and all are damaged.
    """
    found = list_checkpoints(folder)
    damage: list[CrispError] = []
    for checkpoint in reversed(found):
        try:
            state = load_checkpoint(checkpoint)
        except CrispError as error:
            damage.append(error)
            continue
        for found_wrong in damage:
            log.warning("%s; going on from %s", found_wrong, checkpoint.name)
        return checkpoint, state
    if damage:
        raise CrispError(f"{folder}: none of {len(found)} checkpoints is whole; the newest: {damage[0]}")
    return None


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename damaged checkpoints of later steps, so that they are not found again and not counted as kept."""
    for checkpoint in list_checkpoints(folder):
        if int(checkpoint.name.removeprefix(_STEP_PREFIX)) > step:
            aside = checkpoint.with_name(f"{_DAMAGED_PREFIX}{checkpoint.name}")
            if aside.exists():
                shutil.rmtree(aside)
            checkpoint.rename(aside)


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint folder, on the CPU, after its seal has been checked.

    Raises:
        CrispError: a file is missing, truncated or altered.
    """
    remedy = "restore it, or delete it to go on from the one before"
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
