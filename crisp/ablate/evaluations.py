"""What each row is evaluated by: a list, so that a further evaluation is a further entry.

An evaluation is an ordinary `crisp eval` command whose result file is read, or something that training itself wrote.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crisp.ablate.config import AblateConfig
from crisp.ablate.paper import COLUMNS
from crisp.ablate.rows import CRISP, Row
from crisp.errors import CrispError
from crisp.evals.results import read_result, result_if_any
from crisp.metrics import read_metrics
from crisp.runs import KNN_FILE, METRICS_FILE
from crisp.viz.ablation_table import RANDOM

Values = dict[str, float]
"""Percent by column, in the table's order"""

REGION_COLUMNS = {
    "purity": "purity",
    "overlap": "best overlap",
    "boundary-recall": "boundary recall",
    "size": "region size",
    "valid": "valid",
}
"""Measures of region quality, and their columns"""
LAST_LINES = 0.1
"""Share of a run's lines that its last region statistics are means of"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowEvaluation:
    """One evaluation of every row."""

    name: str
    command: Callable[[Row], list[str]] | None
    """What writes its result; None if training does"""
    done: Callable[[Row], bool]
    read: Callable[[Row], Values]
    """What is there of it; {} if nothing is"""


def evaluations_for(config: AblateConfig) -> list[RowEvaluation]:
    """Those that the given data allows.

    Raises:
        CrispError: data that is not where it should be.
    """
    check_data(config)
    found = []
    if config.voc is not None:
        found += [_segmentation(config, "seg-knn"), _segmentation(config, "seg-linear")]
    if config.imagenet is not None:
        found.append(_imagenet(config))
    if config.regions.data is not None:
        found.append(_regions(config))
    return [*found, RowEvaluation(name="online k-NN", command=None, done=lambda row: True, read=_online_knn),
            RowEvaluation(name="regions in training", command=None, done=lambda row: True, read=_training)]  # fmt: skip


def check_data(config: AblateConfig) -> None:
    """Look for every file that evaluations will want: better now than after days.

    Raises:
        CrispError: what is not there.
    """
    if config.voc is not None:
        from crisp.evals.segmentation.voc2012 import open_voc2012

        open_voc2012(config.voc, config.voc_train, None)
    if config.imagenet is not None:
        from crisp.evals.classification.data import SPLITS

        for split in SPLITS:
            if not (config.imagenet / split).is_dir():
                raise CrispError(
                    f"imagenet={config.imagenet}: no folder {split} in it; give the one with train and val"
                )
        if config.list_10pct is not None and not config.list_10pct.is_file():
            raise CrispError(f"list_10pct={config.list_10pct}: no such file; give SimCLR's 10percent.txt")
    if config.regions.data is not None:
        from crisp.evals.region_quality.data import open_masked

        open_masked(region_config(config, weights="checked"))


def _eval(row: Row, config: AblateConfig, task: str, data: Path, *options: str) -> list[str]:
    return [
        *CRISP, "eval", task, "--weights", str(row.run), "--data", str(data), "--out", str(row.evals), "--cache",
        str(config.root / "cache"), "--device", config.device, *options,
    ]  # fmt: skip


def _segmentation(config: AblateConfig, task: str) -> RowEvaluation:
    voc = config.voc
    assert voc is not None
    options = ("--dataset", "voc2012", "--train-set", config.voc_train)
    return _of_result(task, f"{task}-voc2012", lambda row: _eval(row, config, task, voc, *options))


def _imagenet(config: AblateConfig) -> RowEvaluation:
    imagenet = config.imagenet
    assert imagenet is not None
    options = ("--list-10pct", str(config.list_10pct), "--no-full")
    return _of_result("knn", "knn-imagenet-10pct", lambda row: _eval(row, config, "knn", imagenet, *options))


def _of_result(task: str, stem: str, command: Callable[[Row], list[str]]) -> RowEvaluation:
    """An evaluation whose figure stands in one of the paper's columns."""
    column = next(column for column in COLUMNS if f"{column.task}-{column.dataset}" == stem)

    def read(row: Row) -> Values:
        result = result_if_any(row.evals / f"{stem}.json")
        return {} if result is None else {column.name: result.headline()[column.metric].value}

    return RowEvaluation(name=task, command=command, done=lambda row: bool(read(row)), read=read)


# --- region quality --------------------------------------------------------------------------------------------------


def region_config(config: AblateConfig, *, weights: str):  # type: ignore[no-untyped-def]
    """The `RegionQualityConfig` of a row; imported late, with torch."""
    from crisp.evals.region_quality.config import RegionQualityConfig

    regions = config.regions
    given = {name: getattr(regions, name) for name in ("images", "masks", "ignored")}
    chosen = {name: value for name, value in given.items() if value is not None}
    assert regions.data is not None
    return RegionQualityConfig(weights=weights, data=regions.data, **chosen)


def _regions(config: AblateConfig) -> RowEvaluation:
    regions = config.regions
    data = regions.data
    assert data is not None
    options: list[str] = []
    for name in ("images", "masks"):
        if (value := getattr(regions, name)) is not None:
            options += [f"--{name}", value]
    if regions.ignored is not None:
        options += ["--ignored", *map(str, regions.ignored)]

    def read(row: Row) -> Values:
        values: Values = {}
        for path in sorted(row.evals.glob("region-quality-*.json")):
            scores = read_result(path).scores
            for metric, column in REGION_COLUMNS.items():
                of_kind = {
                    kind: next((s.value for s in scores if s.metric == metric and s.settings["regions"] == kind), None)
                    for kind in ("found", "blob")
                }
                if of_kind["found"] is not None:
                    values[column] = of_kind["found"]
                if metric == "purity" and of_kind["blob"] is not None:
                    values[column + RANDOM] = of_kind["blob"]
        return values

    return RowEvaluation(
        name="region-quality",
        command=lambda row: _eval(row, config, "region-quality", data, *options),
        done=lambda row: bool(read(row)),
        read=read,
    )


# --- what training wrote ---------------------------------------------------------------------------------------------


def _online_knn(row: Row) -> Values:
    lines = _lines(row.run / KNN_FILE)
    return {"online k-NN": 100 * float(lines[-1]["top1"])} if lines else {}


def _training(row: Row) -> Values:
    """Region statistics of the last tenth of the run's lines."""
    lines = [line for line in _lines(row.run / METRICS_FILE) if "region_valid_frac" in line]
    last = lines[-max(1, round(len(lines) * LAST_LINES)) :] if lines else []
    return {"valid in training": 100 * _mean([line["region_valid_frac"] for line in last])} if last else {}


def _lines(path: Path) -> Sequence[dict[str, float]]:
    return read_metrics(path) if path.exists() else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
