"""The evaluations of `crisp eval all`, on tiny data in every official layout, side by side in one folder."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crisp.distributed import World
from crisp.evals.all import AllConfig, chosen, write_report
from crisp.evals.catalogue import EVALUATIONS
from crisp.evals.config import EvalConfig
from crisp.evals.suite import Evaluation, failures, find_data, run_suite
from tests.evals.coloured import class_folders
from tests.evals.multilabel import layouts as multilabel
from tests.evals.segmentation import tiny_data as segmentation
from tests.evals.tiny_backbone import tiny_model
from tests.evals.video import official as video

ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))

WRITE: dict[str, Callable[[Path], object]] = {
    "imagenet": lambda root: class_folders(root / "imagenet", train=8),
    "ade20k": segmentation.write_ade20k,
    "voc2012": segmentation.write_voc2012,
    "cityscapes": lambda root: segmentation.write_cityscapes(root / "cityscapes"),
    "multilabel voc2012": multilabel.voc,
    "coco": lambda root: multilabel.coco(root / "coco2014", 2014),
    "coco2017": lambda root: multilabel.coco(root / "coco2017", 2017),
    "vg": lambda root: multilabel.visual_genome(root / "vg"),
    "davis2017": lambda root: video.davis2017(root / "DAVIS"),
    "davis2016": lambda root: video.davis2016(root / "DAVIS-2016"),
    "youtube-vos": lambda root: video.youtube_vos(root / "YouTube-VOS"),
    "mose": lambda root: video.mose(root / "MOSE"),
}


def layout_of(evaluation: Evaluation[Any]) -> str:
    """Which of `WRITE` an evaluation wants."""
    if evaluation.name == "multilabel on voc2012":
        return "multilabel voc2012"
    return evaluation.dataset.removesuffix("-valid")


def config_for(tmp_path: Path, **changes: Any) -> AllConfig:
    return AllConfig(
        weights="tiny:", data=tmp_path / "data", out=tmp_path / "out", cache=tmp_path / "cache", device="cpu",
        threads=1, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("layout", WRITE)
def test_each_layout_is_found_by_its_evaluations_alone(tmp_path: Path, layout: str) -> None:
    (tmp_path / "data").mkdir()
    WRITE[layout](tmp_path / "data")
    found = find_data(tmp_path / "data", EVALUATIONS)
    names = {evaluation.name for evaluation, place in zip(EVALUATIONS, found, strict=True) if place is not None}
    assert names == {evaluation.name for evaluation in EVALUATIONS if layout_of(evaluation) == layout}
    for evaluation, place in zip(EVALUATIONS, found, strict=True):
        if place is not None:
            own = evaluation.configure(config_for(tmp_path, batch=3), place)
            assert (own.data, own.out, own.batch, own.device) == (place, tmp_path / "out", 3, "cpu")


def test_voc_takes_sbd_where_it_is_and_says_where_it_is_not(tmp_path: Path) -> None:
    (evaluation,) = [e for e in EVALUATIONS if e.name == "seg-knn on voc2012"]
    voc = segmentation.write_voc2012(tmp_path / "data")
    config = config_for(tmp_path)
    without = evaluation.configure(config, voc)
    assert without.train_set == "train"
    assert "SBD" in evaluation.note(without)
    sbd = segmentation.write_sbd(voc, tmp_path / "data", png=True)
    with_sbd = evaluation.configure(config, voc)
    assert (with_sbd.train_set, with_sbd.sbd) == ("trainaug", sbd)
    assert evaluation.note(with_sbd) == ""


@pytest.mark.parametrize("place", [".", "imagenet", "imagenet_subsets", "imagenet/imagenet_subsets"])
def test_lists_of_simclr(tmp_path: Path, place: str) -> None:
    (evaluation,) = [e for e in EVALUATIONS if e.task == "knn"]
    imagenet = class_folders(tmp_path / "data/imagenet")
    config = config_for(tmp_path)
    assert "1percent.txt and 10percent.txt" in evaluation.note(evaluation.configure(config, imagenet))
    path = tmp_path / "data" / place / "1percent.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    own = evaluation.configure(config, imagenet)
    assert own.list_1pct.samefile(path)
    assert own.list_10pct is None
    assert "SimCLR's 10percent.txt" in evaluation.note(own)


def shortened(evaluation: Evaluation[Any]) -> Evaluation[Any]:
    """With less training, so that a test can wait for it."""
    changes: dict[str, dict[str, Any]] = {
        "knn": {"k": (1, 5)},
        "linear": {"epochs": 1, "global_batch": 8},
        "seg-knn": {"ks": (1, 3)},
        "seg-linear": {"cs": (1.0, 100.0), "max_iter": 5},
        "multilabel": {"epochs": 2, "global_batch": 8},
        "video": {},
    }

    def configure(config: EvalConfig, found: Path) -> EvalConfig:
        return replace(evaluation.configure(config, found), **changes[evaluation.task])

    return replace(evaluation, configure=configure)


@pytest.mark.slow
def test_everything_runs_and_nothing_runs_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of each task; the second run finds all of it done, and reports the same bytes."""
    (tmp_path / "data").mkdir()
    for layout in ("imagenet", "cityscapes", "coco", "davis2017", "mose"):
        WRITE[layout](tmp_path / "data")
    config = config_for(tmp_path, datasets=("imagenet", "cityscapes", "coco", "davis2017", "mose", "mose-valid", "vg"))
    evaluations = [shortened(evaluation) for evaluation in chosen(config, EVALUATIONS)]
    model = tiny_model(dim=16)
    reports = []
    for _ in range(2):
        with caplog.at_level(logging.INFO):
            caplog.clear()
            outcomes = run_suite(config, model, ALONE, evaluations)
        assert failures(outcomes) == {}
        write_report(config.out, model, outcomes)
        reports.append([(config.out / name).read_bytes() for name in ("all.json", "all.md")])
    ran = [evaluation.name for evaluation in evaluations if evaluation.dataset != "vg"]
    assert [message for message in caplog.messages if message.endswith("done before")] == [
        f"{name}: done before" for name in ran
    ]
    assert not any("begins" in message for message in caplog.messages)
    assert reports[0] == reports[1]
    report = json.loads(reports[0][0])
    assert set(report["tables"]) == {"1", "2", "3"}
    assert list(report["not_run"]) == ["multilabel on vg"]
    measured = {
        column["column"] for columns in report["tables"].values() for column in columns if column["ours"] is not None
    }
    assert measured == {
        "Cityscapes k-NN", "Cityscapes linear", "DAVIS J&F", "DAVIS J", "DAVIS F", "MOSE J&F", "MOSE J", "MOSE F",
        "COCO",
    }  # fmt: skip
    assert any("Cityscapes train has 19 images, as published it has 2975" in note for note in report["notes"])
    assert "knn-imagenet-3-classes.json" in report["results"], "three classes are not held against the paper's thousand"
    assert any(name.suffix == ".zip" for name in config.out.iterdir()), "MOSE's validation is packed for its server"
