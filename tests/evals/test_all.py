"""`crisp eval all`'s driver over small evaluations: what runs, is skipped, is not run again, and the report."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from crisp.distributed import World, world_from_environment
from crisp.errors import CrispError
from crisp.evals.all import AllConfig, chosen, print_report, write_report
from crisp.evals.config import EvalConfig
from crisp.evals.results import ModelFacts, Result, Score
from crisp.evals.suite import Evaluation, Outcome, failures, run_suite
from crisp.models.frozen import FrozenModel
from tests.evals.tiny_backbone import tiny_model
from tests.ranks import in_ranks

ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeConfig(EvalConfig):
    k: int = 20
    lists: Path | None = None


class Fakes:
    """Evaluations that score the number of bytes of a file, and count how often they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fail = ""
        self.k = 20

    def evaluation(
        self, task: str, dataset: str, metrics: Sequence[str] = ("mIoU",), note: str = ""
    ) -> Evaluation[Any]:
        def find(root: Path) -> Path | None:
            return root / dataset if (root / dataset / "file").is_file() else None

        def configure(config: EvalConfig, found: Path) -> FakeConfig:
            return FakeConfig(
                weights=config.weights, data=found, out=config.out, cache=config.cache, k=self.k,
                lists=found / "lists" if (found / "lists").exists() else None,
            )  # fmt: skip

        def run(config: FakeConfig, model: FrozenModel, world: World) -> list[Result]:
            name = f"{task} on {dataset}"
            if self.fail == name:
                raise CrispError(f"{config.data}: broken; mend it")
            self.ran.append(name)
            size = (config.data / "file").stat().st_size
            scores = [Score(metric=metric, value=size + i + 0.123456) for i, metric in enumerate(metrics)]
            return [
                Result(task=task, dataset=dataset, model=ModelFacts.of(model), scores=scores, settings={"k": config.k})
            ]

        return Evaluation(
            task=task, dataset=dataset, find=find, wanted=f"{dataset}/file", configure=configure, run=run,
            note=lambda config: note,
        )  # fmt: skip

    def all(self) -> list[Evaluation[Any]]:
        return [
            self.evaluation("seg-knn", "ade20k"),
            self.evaluation("seg-linear", "ade20k"),
            self.evaluation("seg-knn", "cityscapes"),
            self.evaluation("video", "davis2017", ("J&F", "J", "F")),
            self.evaluation("video", "youtube-vos", ("J&F",), note="YouTube-VOS: a hold-out of train."),
            self.evaluation("knn", "imagenette", ("top1",)),
        ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, size in (("ade20k", 28), ("davis2017", 60), ("imagenette", 90)):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "file").write_bytes(b"x" * size)
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path: Path, data: Path) -> AllConfig:
    return AllConfig(weights="tiny:", data=data, out=tmp_path / "out", cache=tmp_path / "cache")


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO):
        yield caplog


def test_runs_what_the_data_allows(config: AllConfig, logged: pytest.LogCaptureFixture) -> None:
    fakes = Fakes()
    outcomes = run_suite(config, tiny_model(), ALONE, fakes.all())
    assert fakes.ran == ["seg-knn on ade20k", "seg-linear on ade20k", "video on davis2017", "knn on imagenette"]
    assert [outcome.problem for outcome in outcomes if outcome.problem] == [
        f"no cityscapes/file below {config.data}",
        f"no youtube-vos/file below {config.data}",
    ]
    assert failures(outcomes) == {}
    assert "seg-knn on cityscapes: skipped, no cityscapes/file" in logged.messages
    assert f"video on davis2017: will run, with {config.data / 'davis2017'}" in logged.messages
    assert {path.name for path in config.out.glob("*.json")} == {
        "seg-knn-ade20k.json", "seg-linear-ade20k.json", "video-davis2017.json", "knn-imagenette.json", "all-done.json",
    }  # fmt: skip


def again(config: AllConfig, fakes: Fakes, model: FrozenModel | None = None) -> list[str]:
    fakes.ran = []
    run_suite(config, model or tiny_model(), ALONE, fakes.all())
    return fakes.ran


def test_what_is_done_does_not_run_again(config: AllConfig, logged: pytest.LogCaptureFixture) -> None:
    fakes = Fakes()
    first = run_suite(config, tiny_model(), ALONE, fakes.all())
    fakes.ran = []
    logged.clear()
    other_machine = replace(config, batch=3, threads=9, cache=config.out / "cache")
    second = run_suite(other_machine, tiny_model(), ALONE, fakes.all())
    assert fakes.ran == []
    assert [outcome.results for outcome in second] == [outcome.results for outcome in first]
    assert "seg-knn on ade20k: done before" in logged.messages


def test_what_it_depends_on_runs_it_again(config: AllConfig, data: Path) -> None:
    fakes = Fakes()
    everything = again(config, fakes)
    (data / "davis2017" / "file").write_bytes(b"x" * 61)
    assert again(config, fakes) == ["video on davis2017"]
    status = (data / "davis2017" / "file").stat()
    os.utime(data / "davis2017" / "file", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert again(config, fakes) == ["video on davis2017"], "same size, another time"
    (data / "imagenette" / "lists").write_text("a.jpg\n")
    assert again(config, fakes) == ["knn on imagenette"]
    fakes.k = 10
    assert again(config, fakes) == everything
    assert again(config, fakes) == []
    (config.out / "seg-knn-ade20k.json").unlink()
    result = config.out / "video-davis2017.json"
    result.write_text(result.read_text().replace("60.", "99."))
    result.write_text(result.read_text().replace("61.", "99."))
    assert again(config, fakes) == ["seg-knn on ade20k", "video on davis2017"]


def test_results_within_the_data_are_no_data(config: AllConfig, data: Path) -> None:
    fakes = Fakes()
    within = replace(config, out=data / "ade20k" / "runs", cache=data / "ade20k" / "cache")
    assert again(within, fakes)
    assert again(within, fakes) == []


def test_links_in_circles_end(config: AllConfig, data: Path) -> None:
    (data / "ade20k" / "circle").symlink_to(data / "ade20k")
    (data / "ade20k" / "nowhere").symlink_to(data / "gone")
    fakes = Fakes()
    assert again(config, fakes)
    assert again(config, fakes) == []


def test_an_interrupted_suite_goes_on(config: AllConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes()
    evaluations = fakes.all()

    def interrupted(*args: Any) -> list[Result]:
        raise KeyboardInterrupt

    broken = [replace(e, run=interrupted) if e.task == "video" else e for e in evaluations]
    with pytest.raises(KeyboardInterrupt):
        run_suite(config, tiny_model(), ALONE, broken)
    assert fakes.ran == ["seg-knn on ade20k", "seg-linear on ade20k"]
    assert again(config, fakes) == ["video on davis2017", "knn on imagenette"]


def test_one_that_fails_does_not_stop_the_others(config: AllConfig) -> None:
    fakes = Fakes()
    fakes.fail = "seg-linear on ade20k"
    outcomes = run_suite(config, tiny_model(), ALONE, fakes.all())
    assert fakes.ran == ["seg-knn on ade20k", "video on davis2017", "knn on imagenette"]
    assert failures(outcomes) == {"seg-linear on ade20k": f"{config.data / 'ade20k'}: broken; mend it"}
    fakes.fail = ""
    assert again(config, fakes) == ["seg-linear on ade20k"]


def test_each_model_has_its_folder(config: AllConfig) -> None:
    fakes = Fakes()
    again(config, fakes)
    with pytest.raises(CrispError, match=r"holds the results of other weights .*--out"):
        again(config, fakes, tiny_model(dim=4))
    assert again(replace(config, out=config.out / "other"), fakes, tiny_model(dim=4))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_ledger_is_named(config: AllConfig, text: str) -> None:
    config.out.mkdir()
    (config.out / "all-done.json").write_text(text)
    with pytest.raises(CrispError, match=r"all-done\.json: cannot be read .*; remove it"):
        again(config, Fakes())


def test_no_data(config: AllConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CrispError, match=r"none of ade20k, cityscapes, davis2017, .* lies there"):
        again(replace(config, data=tmp_path / "empty"), Fakes())
    with pytest.raises(CrispError, match="no such folder"):
        again(replace(config, data=tmp_path / "nowhere"), Fakes())


def test_choosing(config: AllConfig) -> None:
    evaluations = Fakes().all()

    def names(**choices: Any) -> list[str]:
        return [evaluation.name for evaluation in chosen(replace(config, **choices), evaluations)]

    assert names()[0] == "knn on imagenette", "in the order of TASKS"
    assert len(names()) == 6
    assert names(tasks=("video",)) == ["video on davis2017", "video on youtube-vos"]
    assert names(datasets=("ade20k",)) == ["seg-knn on ade20k", "seg-linear on ade20k"]
    with pytest.raises(CrispError, match="datasets=coco: not one of davis2017, youtube-vos"):
        names(tasks=("video",), datasets=("coco",))


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def outcomes(config: AllConfig, data: Path) -> list[Outcome]:
    (data / "youtube-vos").mkdir()
    (data / "youtube-vos" / "file").write_bytes(b"x" * 66)
    fakes = Fakes()
    fakes.fail = "seg-linear on ade20k"
    return run_suite(config, tiny_model(), ALONE, fakes.all())


def test_report_beside_the_papers_tables(config: AllConfig, outcomes: list[Outcome]) -> None:
    page = write_report(config.out, tiny_model(), outcomes).read_text()
    assert "## Table 1" in page
    assert "## Table 2" in page
    assert "## Table 3" not in page, "nothing of it was measured"
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")
    ]
    heads, ours = cells[0], cells[2]
    assert heads[:6] == ["model", "arch", "ADE20K k-NN", "ours −", "ADE20K linear", "ours −"]
    assert ours == ["tiny ViT", "", "28.1", *[""], *(["–", ""] * 5)]
    assert ["CRISP", "ViT-S", "28.2", "−0.1", "30.5", "", "61.9", "", "67.3", "", "34.3", "", "39.1", ""] in cells
    (crisp,) = [line for line in cells if line[:2] == ["CRISP", "ViT-S/16"]]
    assert crisp[2:10] == ["63.8", "−3.7", "62.2", "−1.1", "65.4", "−3.3", "67.1", "−1.0"]
    assert ["knn on imagenette", "top1 90.1"] in cells
    assert "YouTube-VOS: a hold-out of train." in page
    assert f"- seg-linear on ade20k: {config.data / 'ade20k'}: broken; mend it" in page
    assert f"- seg-knn on cityscapes: no cityscapes/file below {config.data}" in page


def test_two_runs_report_the_same_bytes(config: AllConfig, outcomes: list[Outcome]) -> None:
    def report() -> list[bytes]:
        return [(config.out / name).read_bytes() for name in ("all.json", "all.md")]

    write_report(config.out, tiny_model(), outcomes)
    first = report()
    fakes = Fakes()
    fakes.fail = "seg-linear on ade20k"
    write_report(config.out, tiny_model(), run_suite(config, tiny_model(), ALONE, fakes.all()))
    assert fakes.ran == []
    assert report() == first
    column = json.loads(first[0])["tables"]["1"][0]
    assert column["ours"] == 28.1235
    assert {"model": "CRISP", "arch": "ViT-S", "value": 28.2, "ours_minus_paper": -0.0765} in column["paper"]


@pytest.mark.parametrize("width", [80, 120])
def test_report_on_a_terminal(outcomes: list[Outcome], width: int) -> None:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        print_report(tiny_model(), outcomes, console)
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    for shown in ("Table 1", "ADE20K", "DAVIS", "YouTube-VOS", "63.8  (−3.7)", "knn on imagenette: top1 90.1"):
        assert shown in text
    assert "Cityscapes" not in text.split("skipped")[0].split("failed")[0], "what was not measured takes no room"
    flat = " ".join(text.split())
    assert "seg-linear on ade20k: failed, " in flat
    assert "seg-knn on cityscapes: skipped, no cityscapes/file" in flat


# --- several ranks ---------------------------------------------------------------------------------------------------


def _in_a_rank(data: str, out: str) -> list[Any]:
    config = AllConfig(weights="tiny:", data=Path(data), out=Path(out), cache=Path(out) / "cache")
    fakes = Fakes()
    with world_from_environment("cpu") as world:
        outcomes = run_suite(config, tiny_model(), world, fakes.all())
    return [fakes.ran, [str(outcome) for outcome in outcomes]]


def test_two_ranks_agree(tmp_path: Path, data: Path) -> None:
    for expected in (4, 0):
        first, second = in_ranks(_in_a_rank, 2, tmp_path / f"ranks-{expected}", str(data), str(tmp_path / "out"))
        assert first[0] == second[0]
        assert len(first[0]) == expected


def _fails_in_a_rank(data: str, out: str) -> str:
    config = AllConfig(weights="tiny:", data=Path(data), out=Path(out), cache=Path(out) / "cache")
    fakes = Fakes()
    fakes.fail = "seg-knn on ade20k"
    with world_from_environment("cpu") as world, pytest.raises(CrispError) as caught:
        run_suite(config, tiny_model(), world, fakes.all())
    return str(caught.value)


def test_with_several_ranks_an_error_ends_the_run(tmp_path: Path, data: Path) -> None:
    outcomes = in_ranks(_fails_in_a_rank, 2, tmp_path / "ranks", str(data), str(tmp_path / "out"))
    assert outcomes == [f"{data / 'ade20k'}: broken; mend it"] * 2
