import statistics
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crisp.errors import CrispError
from crisp.evals.features import FrozenFeatures
from crisp.evals.images import WholeImage
from crisp.evals.multilabel import command, protocol
from crisp.evals.multilabel.average_precision import mean_average_precision
from crisp.evals.multilabel.command import MultilabelConfig, evaluate_multilabel
from crisp.evals.multilabel.low_shot import low_shot
from crisp.evals.multilabel.probe import scores_of, train_probe
from crisp.evals.multilabel.voc import open_voc2012
from crisp.evals.results import read_result, result_json
from crisp.evals.running import evaluation_world
from crisp.evals.store import FeatureStore
from tests.evals.classification.evaluations import alone
from tests.evals.coloured import colour_model
from tests.evals.multilabel import layouts
from tests.evals.tiny_backbone import tiny_model
from tests.ranks import in_ranks


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.voc(tmp_path_factory.mktemp("voc"))


def config(data: Path, cache: Path, **changes: Any) -> MultilabelConfig:
    options = {"epochs": 3, "global_batch": 16, "batch": 8, "threads": 1, "device": "cpu", "shots": (1,), **changes}
    return MultilabelConfig(weights="tiny:", data=data, cache=cache, **options)


def test_the_scores_are_those_of_a_plain_chain(voc: Path, tmp_path: Path) -> None:
    result = evaluate_multilabel(config(voc, tmp_path), tiny_model(), alone())
    data = open_voc2012(voc)
    features = FrozenFeatures(tiny_model(), "cls-mean", side_px=224, device=torch.device("cpu"))
    train, val = (
        torch.from_numpy(np.array(features.stored(
            FeatureStore(tmp_path / "plain"), images.source, WholeImage(224),
            batch=8, threads=1, world=alone(), title="",
        )))
        for images in (data.train, data.val)
    )  # fmt: skip

    def plain(numbers: np.ndarray, seed: int) -> tuple[float, float]:
        probe = train_probe(train[numbers], data.train.targets[numbers], epochs=3, global_batch=16, seed=seed)
        return mean_average_precision(scores_of(probe, val), data.val.targets)

    shots = [plain(low_shot(data.train, 1, seed), seed) for seed in range(5)]
    expected = {
        **{name: (100 * value, None) for name, value in zip(("mAP", "mAP-voc"), plain(np.arange(40), 0), strict=True)},
        **{
            f"{name}-1shot": (100 * statistics.mean(values), 100 * statistics.stdev(values))
            for name, values in zip(("mAP", "mAP-voc"), zip(*shots, strict=True), strict=True)
        },
    }
    assert {score.metric for score in result.scores} == set(expected)
    for score in result.scores:
        value, std = expected[score.metric]
        assert score.value == pytest.approx(value, abs=1e-6)
        assert score.std == (None if std is None else pytest.approx(std, abs=1e-6))
    assert (result.task, result.dataset) == ("multilabel", "voc2012")


def test_constant_features_give_the_share_of_positives(voc: Path, tmp_path: Path) -> None:
    result = evaluate_multilabel(config(voc, tmp_path), colour_model(constant=True), alone())
    floor = 100 * (open_voc2012(voc).val.targets == 1).mean()
    for score in result.scores:
        assert score.value == pytest.approx(floor)
        assert score.std == (pytest.approx(0) if "shot" in score.metric else None)


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco(tmp_path: Path, year: int) -> None:
    place = layouts.coco(tmp_path / "coco", year)
    result = evaluate_multilabel(config(place, tmp_path, shots=None, fit="crop"), tiny_model(), alone())
    assert [score.metric for score in result.scores] == ["mAP", "mAP-voc"]
    assert result.dataset == ("coco" if year == 2014 else "coco2017")
    assert result.settings["data"] == f"coco{year}"
    assert result.settings["prepare"] == {"resize_px": 256, "crop_px": 224}


def test_visual_genome_has_500_names_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = layouts.visual_genome(tmp_path / "vg")
    with pytest.raises(CrispError, match="4 object names, 500 are wanted"):
        evaluate_multilabel(config(place, tmp_path), tiny_model(), alone())
    few = command.open_visual_genome
    monkeypatch.setattr(command, "open_visual_genome", lambda place: few(place, classes=3))
    result = evaluate_multilabel(config(place, tmp_path, shots=None), tiny_model(), alone())
    assert (result.dataset, result.settings["classes"]) == ("vg", 3)


def test_two_runs_write_the_same_json(voc: Path, tmp_path: Path) -> None:
    first, second = (
        result_json(evaluate_multilabel(config(voc, tmp_path / name), tiny_model(), alone())) for name in ("a", "b")
    )
    assert first == second


@pytest.mark.slow
def test_two_ranks_find_the_same(voc: Path, tmp_path: Path) -> None:
    expected = result_json(evaluate_multilabel(config(voc, tmp_path / "one"), tiny_model(), alone()))
    assert in_ranks(_result, 2, tmp_path / "ranks", str(voc), str(tmp_path / "two")) == [expected, expected]


def _result(voc: str, cache: str) -> str:
    of_ranks = config(Path(voc), Path(cache))
    with evaluation_world(of_ranks) as world:
        return result_json(evaluate_multilabel(of_ranks, tiny_model(), world))


def test_the_default_is_the_papers(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = MultilabelConfig(weights="w", data=voc)
    assert default.global_batch == 1024
    asked: list[tuple[int, int]] = []

    def noted(features: Any, targets: Any, *, epochs: int, global_batch: int, seed: int) -> torch.nn.Linear:
        asked.append((len(targets), epochs))
        return train_probe(features, targets, epochs=1, global_batch=global_batch, seed=seed)

    monkeypatch.setattr(command, "train_probe", noted)
    monkeypatch.setattr(protocol, "SHOTS", (1,))  # the tiny set has no five images for each class
    result = evaluate_multilabel(config(voc, tmp_path, epochs=None, shots=None), tiny_model(), alone())
    assert asked == [(20, 500)] * 5 + [(40, 500)]
    assert result.settings["low_shot_seeds"] == [0, 1, 2, 3, 4]


def test_mistakes_are_told_before_anything_is_extracted(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrozenFeatures, "__init__", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(CrispError, match="shots=5: class"):
        evaluate_multilabel(config(voc, tmp_path, shots=(5,)), tiny_model(), alone())
    with pytest.raises(CrispError, match="no vg here"):
        evaluate_multilabel(config(voc, tmp_path, dataset="vg"), tiny_model(), alone())
    with pytest.raises(CrispError, match=r"shots=\(0,\)"):
        config(voc, tmp_path, shots=(0,))
    with pytest.raises(CrispError, match="epochs=0: must be at least 1"):
        config(voc, tmp_path, epochs=0)


def test_the_command_writes_what_it_finds(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = types.ModuleType("crisp.models.published")
    published.load_frozen = lambda source, *, device: tiny_model()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "crisp.models.published", published)
    command.main(
        ["--weights", "tiny:", "--data", str(voc), "--out", str(tmp_path), "--cache", str(tmp_path / "cache"),
         "--device", "cpu", "--threads", "1", "--epochs", "1", "--shots", "1"]
    )  # fmt: skip
    result = read_result(tmp_path / "multilabel-voc2012.json")
    assert result.settings["epochs"] == 1
    assert "mAP" in (tmp_path / "multilabel-voc2012.md").read_text()
