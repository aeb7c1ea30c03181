"""Many evaluations of one model over one folder of data: what can run, what ran before, what failed.

What ran before is known from OUT/all-done.json: for each evaluation a digest of all that it depends on, and the digests
of the result files that it wrote.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.config import EvalConfig
from crisp.evals.results import Result, read_result, summary, write_result, write_whole
from crisp.evals.running import from_main
from crisp.models.frozen import FrozenModel

log = logging.getLogger(__name__)

DONE_FILE = "all-done.json"
# What a result does not depend on, beside the fields that the key holds in another form.
_NOT_IN_KEY = {"weights", "data", "out", "cache", "device", "threads", "batch"}

C = TypeVar("C", bound=EvalConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(Generic[C]):
    """One evaluation on one data set."""

    task: str
    dataset: str
    find: Callable[[Path], Path | None]
    """Where below a folder the data set lies"""
    wanted: str
    """What `find` looks for, for the line that says why an evaluation is skipped"""
    configure: Callable[[EvalConfig, Path], C]
    """The evaluation's own choices, from those of all and the folder that was found"""
    run: Callable[[C, FrozenModel, World], Sequence[Result]]
    """Collective; the same results on every rank"""
    note: Callable[[C], str] = lambda config: ""
    """What a reader must know who holds the figures against the paper's"""

    @property
    def name(self) -> str:
        """`seg-knn on ade20k`."""
        return f"{self.task} on {self.dataset}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of an evaluation."""

    evaluation: Evaluation[Any]
    results: Sequence[Result] = ()
    note: str = ""
    """The evaluation's, where there are results"""
    problem: str = ""
    """Why there are no results"""
    failed: bool = False
    """The problem is an error, not data that is absent"""


def find_data(root: Path, evaluations: Sequence[Evaluation[Any]]) -> list[Path | None]:
    """Where the data of each evaluation lies.

    Raises:
        CrispError: no such folder, or there is nothing for any of them.
    """
    if not root.is_dir():
        raise CrispError(f"{root}: no such folder; give the one that your data sets were unpacked in with --data")
    found = [evaluation.find(root) for evaluation in evaluations]
    if not any(found):
        names = ", ".join(dict.fromkeys(evaluation.dataset for evaluation in evaluations))
        raise CrispError(f"{root}: none of {names} lies there; docs/evaluate.md says which folders are looked for")
    return found


def run_suite(
    config: EvalConfig, model: FrozenModel, world: World, evaluations: Sequence[Evaluation[Any]]
) -> list[Outcome]:
    """Run what the data allows and what has not run before; results are written as they come. Collective.

    In a world of one, an evaluation's error is kept for the end and the others run. With several ranks it ends the run:
    the other ranks may be at another place by then.

    Args:
        config: with `data` as the folder of all data sets and `out` as that of results.
        model: on the device of `world`.
        world: this rank's.
        evaluations: in the order in which to run.

    Raises:
        CrispError: no data at all, OUT holds another model's results or cannot be written; an evaluation's own.
    """
    found = from_main(world, lambda: find_data(config.data, evaluations))
    ledger = Ledger(config.out, model)
    from_main(world, ledger.check)
    planned = [
        (evaluation, None if place is None else evaluation.configure(config, place))
        for evaluation, place in zip(evaluations, found, strict=True)
    ]
    keys = from_main(world, lambda: [None if own is None else key_of(own, model) for _, own in planned])
    before = from_main(world, lambda: [ledger.results(e.name, key) for (e, _), key in zip(planned, keys, strict=True)])
    if world.is_main:
        _log_plan(planned, before)
    outcomes = []
    for (evaluation, own), key, results in zip(planned, keys, before, strict=True):
        if own is None or key is None:
            missing = f"no {evaluation.wanted} below {config.data}"
            outcomes.append(Outcome(evaluation=evaluation, problem=missing))
        elif results is not None:
            outcomes.append(Outcome(evaluation=evaluation, results=results, note=evaluation.note(own)))
        else:
            outcomes.append(_run(evaluation, own, key, model, world, ledger))
    return outcomes


def _run(
    evaluation: Evaluation[Any], own: EvalConfig, key: str, model: FrozenModel, world: World, ledger: "Ledger"
) -> Outcome:
    if world.is_main:
        log.info("%s: begins, with %s", evaluation.name, own.data)
    try:
        results = list(evaluation.run(own, model, world))
    except CrispError as error:
        if world.size > 1:
            raise
        log.error("%s: %s", evaluation.name, error)
        return Outcome(evaluation=evaluation, problem=str(error), failed=True)
    results = from_main(world, lambda: ledger.write(evaluation.name, key, results))
    if world.is_main:
        for result in results:
            log.info("%s on %s: %s", result.task, result.dataset, summary(result) or "no scores, the truth is hidden")
    return Outcome(evaluation=evaluation, results=results, note=evaluation.note(own))


def _log_plan(
    planned: Sequence[tuple[Evaluation[Any], EvalConfig | None]], before: Sequence[list[Result] | None]
) -> None:
    for (evaluation, own), results in zip(planned, before, strict=True):
        if own is None:
            log.info("%s: skipped, no %s", evaluation.name, evaluation.wanted)
        elif results is not None:
            log.info("%s: done before", evaluation.name)
        else:
            log.info("%s: will run, with %s", evaluation.name, own.data)


class Ledger:
    """What is done, in the folder of results.

    Args:
        out: the folder.
        model: whose results it is for.
    """

    def __init__(self, out: Path, model: FrozenModel) -> None:
        self.out, self._model = out, model

    def check(self) -> None:
        """Raise CrispError if the folder holds the results of another model: they would be mixed up."""
        whose = self._read().get("model")
        if whose not in (None, self._model.fingerprint):
            raise CrispError(
                f"{self.out}: holds the results of other weights (fingerprint {str(whose)[:16]}); give each model a "
                f"folder of its own with --out"
            )

    def results(self, name: str, key: str | None) -> list[Result] | None:
        """Those of an evaluation that was done with this key; None if it was not, or a file is not as it was."""
        entry = self._read().get("done", {}).get(name)
        if key is None or entry is None or entry["key"] != key:
            return None
        for file, digest in entry["files"].items():
            path = self.out / file
            if not path.is_file() or _digest(path.read_bytes()) != digest:
                log.info("%s: not as it was written, so %s runs again", path, name)
                return None
        return [read_result(self.out / file) for file in entry["files"]]

    def write(self, name: str, key: str, results: Sequence[Result]) -> list[Result]:
        """Write the results, then say that they are whole; returns them as they are read another time."""
        files = {path.name: _digest(path.read_bytes()) for path in (write_result(self.out, r) for r in results)}
        whole = self._read()
        done = {**whole.get("done", {}), name: {"key": key, "files": files}}
        whole = {"model": self._model.fingerprint, "done": done}
        write_whole(self.out / DONE_FILE, json.dumps(whole, indent=2, sort_keys=True) + "\n")
        return [read_result(self.out / file) for file in files]

    def _read(self) -> dict[str, Any]:
        path = self.out / DONE_FILE
        if not path.exists():
            return {}
        try:
            whole = json.loads(path.read_text())
            if not isinstance(whole, dict):
                raise TypeError("not an object")
        except (OSError, ValueError, TypeError) as error:
            raise CrispError(f"{path}: cannot be read ({error}); remove it, and everything runs again") from error
        return whole


def key_of(config: EvalConfig, model: FrozenModel) -> str:
    """Digest of all that an evaluation's results depend on: weights, choices, the names, sizes and times of the data's
    files. Costs a listing of the data's folder."""
    apart = {config.out.resolve(), config.cache.resolve()}
    chosen = {
        field.name: _plain(getattr(config, field.name), apart)
        for field in fields(config)
        if field.name not in _NOT_IN_KEY
    }
    whole = {"weights": model.fingerprint, "data": stamp(config.data, apart), "chosen": chosen}
    return _digest(json.dumps(whole, sort_keys=True, default=str).encode())


def _plain(value: object, apart: set[Path]) -> object:
    return stamp(value, apart) if isinstance(value, Path) else value


def stamp(place: Path, apart: set[Path]) -> str:
    """Digest of the names, sizes and times of change of a file or of all files in a folder, without those `apart`."""
    digest = hashlib.sha256()
    if place.is_file():
        digest.update(_line(place, place.name))
    seen: set[tuple[int, int]] = set()  # a folder that links lead to twice counts once, and circles end
    for folder, folders, files in os.walk(place, followlinks=True):
        at = os.stat(folder)
        if (at.st_dev, at.st_ino) in seen or Path(folder).resolve() in apart:
            folders.clear()
            continue
        seen.add((at.st_dev, at.st_ino))
        folders.sort()
        for name in sorted(files):
            digest.update(_line(Path(folder, name), os.path.relpath(os.path.join(folder, name), place)))
    return digest.hexdigest()


def _line(path: Path, shown: str) -> bytes:
    try:
        status = path.stat()
    except OSError:  # a link to nowhere
        return f"{shown}\0\n".encode()
    return f"{shown}\0{status.st_size}\0{status.st_mtime_ns}\n".encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def failures(outcomes: Sequence[Outcome]) -> Mapping[str, str]:
    """The error of each evaluation that failed, by its name."""
    return {outcome.evaluation.name: outcome.problem for outcome in outcomes if outcome.failed}
