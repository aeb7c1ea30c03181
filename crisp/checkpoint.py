"""Checkpoints that are whole or absent: written aside, flushed to disk, sealed, then renamed into place.

RUN/checkpoints/step-00000100/student/shard-00001-model-00001-of-00001.safetensors   what rank 0 wrote of a part
RUN/checkpoints/step-00000100/values.json        plain values, and which names of a part share a tensor
RUN/checkpoints/step-00000100/checkpoint.json    the seal: step, and size and SHA-256 of every other file

A part (student, teacher, …) is a torch.distributed.checkpoint of safetensors files. Each rank writes its share: of
sharded tensors its shards, of replicated ones those that fall to it. Any number of ranks, sharded or not, reads what
any other wrote. Nothing is pickled, so reading a checkpoint runs no code that is in it.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from crisp.distributed import gather_over_ranks, rank_and_size
from crisp.errors import CrispError

log = logging.getLogger(__name__)

SEAL_FILE = "checkpoint.json"
VALUES_FILE = "values.json"
_STEP_PREFIX = "step-"
_PARTIAL_PREFIX = ".partial-"
_DAMAGED_PREFIX = ".damaged-"
_REMEDY = "restore it, or delete it to go on from the one before"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    path: Path
    values: dict[str, Any]
    """The plain values that were saved with it"""


class _NotSavedError(Exception):
    """Why a save failed on some rank, known to all."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run's checkpoints folder, oldest first."""
    return sorted(p for p in folder.glob(f"{_STEP_PREFIX}*") if (p / SEAL_FILE).is_file())


def list_damaged(folder: Path) -> list[int]:
    """Steps of checkpoints that a resumed run found damaged and set aside, in order."""
    return sorted(
        int(step)
        for path in folder.glob(f"{_DAMAGED_PREFIX}{_STEP_PREFIX}*")
        if (step := path.name.removeprefix(_DAMAGED_PREFIX + _STEP_PREFIX)).isdigit()
    )


def step_of(checkpoint: Path) -> int:
    """The optimiser steps that were done when it was written, by its name."""
    return int(checkpoint.name.removeprefix(_STEP_PREFIX))


def remove_partial(folder: Path) -> None:
    """Delete what a killed save or a killed deletion left behind."""
    for path in folder.glob(f"{_PARTIAL_PREFIX}*"):
        shutil.rmtree(path)


# ---------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    folder: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    values: Mapping[str, Any],
    *,
    step: int,
    doomed: Callable[[list[int]], list[int]],
) -> Path:
    """Write the checkpoint of `step`, then delete those that `doomed` picks from all there are. Collective.

    At whatever moment a process dies, every folder named step-N is a whole checkpoint.

    Args:
        folder: the run's checkpoints, on a file system that all ranks share.
        parts: tensors by part and name, plain (then equal on all ranks) or sharded; names may share a tensor.
        values: what JSON can hold, equal on all ranks.
        step: optimiser steps done.
        doomed: of the steps that have a checkpoint, those whose it may delete.

    Raises:
        CrispError: some rank cannot write (a full disk, for one), on all ranks; the checkpoints that were there
            still are.
    """
    final = folder / f"{_STEP_PREFIX}{step:08d}"
    partial = folder / f"{_PARTIAL_PREFIX}{final.name}"
    main = rank_and_size()[0] == 0
    try:
        # Either torch agrees on what failed, or we do: a piece of work that is collective has nothing around it.
        _on_every_rank(lambda: _prepare(partial, parts) if main else None)
        for part, tensors in parts.items():
            _on_every_rank(functools.partial(_write_part, partial / part, tensors))
        shares = _on_every_rank(lambda: _flush_share(partial, parts))
        files = {name: facts for share in shares for name, facts in share.items()}
        aliases = {part: _aliases(tensors) for part, tensors in parts.items()}
        content = {"values": values, "aliases": aliases}
        _on_every_rank(lambda: _complete(partial, final, files, content, step, doomed) if main else None)
    except _NotSavedError as error:
        if main:
            with contextlib.suppress(OSError):
                remove_partial(folder)
        kept = ", ".join(path.name for path in list_checkpoints(folder)) or "none"
        raise CrispError(
            f"{final}: not saved ({error}); kept: {kept}; make room, or choose another folder with --out"
        ) from error
    return final


def _on_every_rank(work: Callable[[], T]) -> list[T]:
    """What all ranks' work returned; if one could not write, none goes on. Collective."""
    result: T | None = None
    reason: str | None = None
    try:
        result = work()
    except CheckpointException as error:  # torch's own agreement: the same on all ranks
        if not all(isinstance(cause, OSError | RuntimeError) for cause, _ in error.failures.values()):
            raise  # a mistake of ours, or Ctrl-C
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = _reason(cause, rank)
    except (OSError, RuntimeError) as error:
        reason = _reason(error, rank_and_size()[0])
    outcomes = gather_over_ranks((result, reason))
    if reasons := [why for _, why in outcomes if why is not None]:
        raise _NotSavedError(reasons[0])
    return [of_rank for of_rank, _ in outcomes]  # type: ignore[misc]  # without a reason there is a result


def _reason(error: BaseException, rank: int) -> str:
    words = error.strerror or str(error) if isinstance(error, OSError) else str(error).splitlines()[0]
    return words if rank_and_size()[1] == 1 else f"rank {rank}: {words}"


def _prepare(partial: Path, parts: Iterable[str]) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(partial.parent)
    partial.mkdir()
    for part in parts:
        (partial / part).mkdir()


def _write_part(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write and flush this rank's share of a part. Collective; what fails on one rank, torch raises on all."""
    aliases = _aliases(tensors)
    distinct = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _quiet_alone():
        # A file per rank and part: the writer holds a copy of a file in memory until it is written.
        dcp.save(distinct, storage_writer=writer, no_dist=rank_and_size()[1] == 1)


def _flush_share(partial: Path, parts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Flush the folders; size and SHA-256 of the files that this rank wrote, by relative path."""
    for part in parts:
        _flush(partial / part)
    own = partial.glob(f"*/shard-{rank_and_size()[0] + 1:05d}-*")  # the writer counts ranks from 1
    return {path.relative_to(partial).as_posix(): _facts(path) for path in own}


def _complete(
    partial: Path,
    final: Path,
    files: dict[str, dict[str, Any]],
    content: dict[str, Any],
    step: int,
    doomed: Callable[[list[int]], list[int]],
) -> None:
    """What one rank does when all have written: seal, rename, delete what need not stay."""
    _write_json(partial / VALUES_FILE, content)
    files = {**files, VALUES_FILE: _facts(partial / VALUES_FILE)}
    _write_json(partial / SEAL_FILE, {"step": step, "files": dict(sorted(files.items()))})
    _flush(partial)
    if final.exists():  # resumed from this very step and saved again
        _discard(final)
    partial.rename(final)
    _flush(final.parent)
    found = {step_of(path): path for path in list_checkpoints(final.parent)}
    for old in doomed(list(found)):
        _discard(found[old])


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
    _flush(path)


def _flush(path: Path) -> None:
    """Have the kernel write a file's (or a folder's) content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint so that it never looks whole while half of it is gone."""
    doomed = checkpoint.with_name(f"{_PARTIAL_PREFIX}old-{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename damaged checkpoints of later steps, so that they are not found again and not counted as kept."""
    for checkpoint in list_checkpoints(folder):
        if step_of(checkpoint) > step:
            aside = checkpoint.with_name(f"{_DAMAGED_PREFIX}{checkpoint.name}")
            if aside.exists():
                shutil.rmtree(aside)
            checkpoint.rename(aside)


# ---------------------------------------------------------------------------------------------------------- reading


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where none was ever written. Collective: each rank checks a share.

    Damaged ones are passed over, with a warning.

    Raises:
        CrispError: there are checkpoints, and all are damaged; or ranks see different ones.
    """
    found = list_checkpoints(folder)
    seen = gather_over_ranks([path.name for path in found])
    if any(names != seen[0] for names in seen):
        newest = sorted({names[-1] if names else "none" for names in seen})
        raise CrispError(
            f"{folder}: ranks see different checkpoints (the newest: {', '.join(newest)}); put the run on a file "
            f"system that all nodes share"
        )
    damage: list[str] = []
    for checkpoint in reversed(found):
        wrong = next((words for words in gather_over_ranks(_damage(checkpoint, *rank_and_size())) if words), None)
        if wrong is None:
            for words in damage:
                log.warning("%s; going on from %s", words, checkpoint.name)
            return Checkpoint(path=checkpoint, values=_read_json(checkpoint / VALUES_FILE)["values"])
        damage.append(wrong)
    if damage:
        raise CrispError(f"{folder}: none of {len(found)} checkpoints is whole; the newest: {damage[0]}")
    return None


def load_module_state(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """One part of a checkpoint, "teacher" for one: whole plain tensors on the CPU, after its seal has been checked.

    By this process alone, whatever number of ranks wrote it. For `load_weights`.

    Raises:
        CrispError: a file is missing, truncated or altered, or there is no such part.
    """
    wrong = _damage(checkpoint, part=part)
    if wrong:
        raise CrispError(wrong)
    if not (checkpoint / part).is_dir():
        raise CrispError(f"{checkpoint}: holds no {part}")
    state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored_tensors(checkpoint, part).items()}
    _read(checkpoint, part, state)
    return state | {alias: state[name] for alias, name in _stored_aliases(checkpoint, part).items()}


def load_into(checkpoint: Path, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors, plain or sharded, with one part of a checkpoint that `load_newest` found whole.

    Every rank reads what it holds. Names that share a tensor must be the same ones as when it was saved.

    Raises:
        CrispError: names, shapes or what is shared are those of another architecture.
    """
    aliases = _aliases(tensors)
    stored = stored_tensors(checkpoint, part)
    shapes = {name: shape for name, (shape, _) in stored.items()}
    stored_aliases = _stored_aliases(checkpoint, part)
    shapes |= {alias: shapes[name] for alias, name in stored_aliases.items()}
    _check_same(tensors, shapes, source=f"{checkpoint} ({part})")
    if aliases != stored_aliases:
        raise CrispError(
            f"{checkpoint} ({part}): a checkpoint of another architecture (other modules share their weights); give "
            f"the model fields that it was trained with"
        )
    _read(checkpoint, part, {name: tensors[name].detach() for name in stored})


def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, source: Path | str) -> None:
    """Load a module's state exactly, or say what differs.

    Raises:
        CrispError: keys or shapes are those of another architecture.
    """
    _check_same(module.state_dict(), {name: tensor.shape for name, tensor in state.items()}, source=source)
    module.load_state_dict(state)


def stored_tensors(checkpoint: Path, part: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Whole shape and dtype of each tensor of a part, by name, in the names' order."""
    described = HuggingFaceStorageReader(str(checkpoint / part)).read_metadata().state_dict_metadata
    return {
        name: (about.size, about.properties.dtype)  # type: ignore[union-attr]  # safetensors hold tensors alone
        for name, about in sorted(described.items())
    }


def _read(checkpoint: Path, part: str, tensors: dict[str, Tensor]) -> None:
    with _quiet_alone():
        # No collectives: every rank finds by itself what it needs, from files that it sees as all others do.
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint / part)), no_dist=True)


def _damage(checkpoint: Path, rank: int = 0, size: int = 1, *, part: str | None = None) -> str | None:
    """What is wrong with this rank's share of the files (or of those that reading one part needs), if anything is."""
    try:
        files = _read_json(checkpoint / SEAL_FILE)["files"]
        expected = [(name, about["bytes"], about["sha256"]) for name, about in sorted(files.items())]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{checkpoint / SEAL_FILE}: unreadable ({error!r}); {_REMEDY}"
    present = {path.relative_to(checkpoint).as_posix() for path in checkpoint.glob("*/*")} | {VALUES_FILE}
    if strange := sorted(present - {name for name, _, _ in expected}):
        return f"{checkpoint / strange[0]}: not in {SEAL_FILE}, so added or altered; {_REMEDY}"
    if part is not None:
        expected = [about for about in expected if about[0] == VALUES_FILE or about[0].startswith(f"{part}/")]
    for name, bytes_expected, sha256 in expected[rank::size]:
        path = checkpoint / name
        try:
            facts = _facts(path)
        except FileNotFoundError:
            return f"{path}: missing; {_REMEDY}"
        except OSError as error:
            return f"{path}: unreadable ({error.strerror}); {_REMEDY}"
        if facts["bytes"] != bytes_expected:
            return f"{path}: {facts['bytes']} bytes of {bytes_expected}, so truncated; {_REMEDY}"
        if facts["sha256"] != sha256:
            return f"{path}: its SHA-256 is not that of {SEAL_FILE}, so altered; {_REMEDY}"
    return None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _stored_aliases(checkpoint: Path, part: str) -> dict[str, str]:
    aliases: dict[str, str] = _read_json(checkpoint / VALUES_FILE)["aliases"][part]
    return aliases


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of a tensor that has an earlier name (heads that are shared), and that name: it is stored once."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: first[id(tensor)] for name, tensor in tensors.items() if first[id(tensor)] != name}


def _check_same(own: Mapping[str, Tensor], there: Mapping[str, torch.Size], *, source: Path | str) -> None:
    differing = [
        f"{key} is {tuple(there[key]) if key in there else 'absent'} there and "
        f"{tuple(own[key].shape) if key in own else 'absent'} here"
        for key in sorted(own.keys() | there.keys())
        if key not in own or key not in there or own[key].shape != there[key]
    ]
    if differing:
        raise CrispError(
            f"{source}: a checkpoint of another architecture ({len(differing)} tensors differ; {differing[0]}); "
            f"give the model fields that it was trained with"
        )


@contextlib.contextmanager
def _quiet_alone() -> Iterator[None]:
    """Without torch's warning that it saves or loads in one process, where that is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
