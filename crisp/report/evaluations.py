"""Results of `crisp eval` that belong on the page: those in the runs' folders, and in folders that are named."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crisp.errors import CrispError
from crisp.evals.results import Result, result_if_any
from crisp.evals.suite import DONE_FILE

FOLDER = "evals"
"""Of a run, where its results are looked for"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A result, and the run that it is of."""

    result: Result
    run: int | None
    """Place among the page's runs; None for another model's"""


def gather_results(runs: Sequence[Path], further: Sequence[Path]) -> tuple[list[Found], list[str]]:
    """Every result by task and data set, those of runs first; and the names of JSON files that are none.

    Of a folder, its own files and those of the folders in it. A result is a run's if its weights lie in the run's
    folder, or if it lies in RUN/evals and its weights are those of no other run.

    Raises:
        CrispError: a folder of `further` that is not there.
    """
    if missing := next((folder for folder in further if not folder.is_dir()), None):
        raise CrispError(f"evals={missing}: no such folder; give one that 'crisp eval --out' wrote")
    found: dict[Path, Found] = {}
    others = []
    for home, folder in (*enumerate(run / FOLDER for run in runs), *((None, folder) for folder in further)):
        for path in sorted({*folder.glob("*.json"), *folder.glob("*/*.json")}):
            if path.name == DONE_FILE or path.resolve() in found:
                continue
            result = result_if_any(path)
            if result is None:
                others.append(str(path))
                continue
            run = _run_of(result, runs)
            found[path.resolve()] = Found(result=result, run=home if run is None else run)
    order = sorted(found.values(), key=lambda f: (f.result.stem, f.run is None, f.run or 0, f.result.model.name))
    return order, others


def _run_of(result: Result, runs: Sequence[Path]) -> int | None:
    source = Path(result.model.source).resolve()
    return next((i for i, run in enumerate(runs) if source.is_relative_to(run.resolve())), None)
