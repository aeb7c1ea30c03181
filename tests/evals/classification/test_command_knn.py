import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crisp.errors import CrispError
from crisp.evals.classification import command_knn, command_linear
from crisp.evals.classification.command_knn import KnnConfig, evaluate_knn
from crisp.evals.features import FrozenFeatures
from crisp.evals.knn import knn_accuracy
from crisp.evals.results import read_result, result_json
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from tests.evals.classification.evaluations import alone
from tests.evals.coloured import WORDNET_IDS, class_folders, colour_model
from tests.evals.tiny_backbone import tiny_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("pictures"))


def config(root: Path, cache: Path, **changes: Any) -> KnnConfig:
    options = {"k": (1, 3), "batch": 4, "threads": 1, "device": "cpu", **changes}
    return KnnConfig(weights="tiny:", data=root, cache=cache, **options)


def test_perfect_features_give_100_and_constant_ones_a_third(root: Path, tmp_path: Path) -> None:
    (perfect,) = evaluate_knn(config(root, tmp_path, k=(1, 4)), colour_model(), alone())
    assert [score.value for score in perfect.scores] == [100, 100]
    assert perfect.chosen["k"] == 1  # the smallest of equals
    (constant,) = evaluate_knn(config(root, tmp_path), colour_model(constant=True), alone())
    assert [score.value for score in constant.scores] == [pytest.approx(100 / 3)] * 2


def test_lists_score_with_their_images_alone_extracted_alone_or_with_all(root: Path, tmp_path: Path) -> None:
    few = tmp_path / "1percent.txt"
    few.write_text("".join(f"{name}_{i}.JPEG\n" for name in WORDNET_IDS[:3] for i in (3, 1)))
    both = evaluate_knn(config(root, tmp_path / "a", list_1pct=few), tiny_model(), alone())
    only = evaluate_knn(config(root, tmp_path / "b", list_1pct=few, full=False), tiny_model(), alone())
    assert [result.dataset for result in both] == [f"{root.name.lower()}-1pct", root.name.lower()]
    assert [result.settings["train_images"] for result in both] == [6, 12]
    assert result_json(only[0]) == result_json(both[0])
    everything = evaluate_knn(config(root, tmp_path / "a"), tiny_model(), alone())
    assert result_json(everything[0]) == result_json(both[1])


def test_shards_score_as_the_folders_that_they_were_made_of(root: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        out = str(tmp_path / "shards" / split)
        shard_imagenet(ShardConfig(source=str(root / split), out=out, workers=1, shard_samples=5))
    options = {"k": (1, 2, 5)}
    (folders,) = evaluate_knn(config(root, tmp_path, **options), tiny_model(), alone())
    (shards,) = evaluate_knn(config(tmp_path / "shards", tmp_path, **options), tiny_model(), alone())
    assert [(score.settings, score.value) for score in folders.scores] == [
        (score.settings, score.value) for score in shards.scores
    ]


def test_a_model_without_cls_is_scored_by_its_mean_patch_and_the_result_says_so(root: Path, tmp_path: Path) -> None:
    (without,) = evaluate_knn(config(root, tmp_path), tiny_model(with_cls=False), alone())
    assert without.settings["tokens"] == "mean"
    (with_cls,) = evaluate_knn(config(root, tmp_path), tiny_model(), alone())
    assert with_cls.settings["tokens"] == "cls"


def test_mistakes_are_told_before_anything_is_extracted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrozenFeatures, "__init__", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(CrispError, match=r"k=\(10, 20, 100, 200\): there are 12 training images"):
        evaluate_knn(config(root, tmp_path, k=(10, 20, 100, 200)), tiny_model(), alone())
    few = tmp_path / "few.txt"
    few.write_text("n0_0.JPEG\n")
    with pytest.raises(CrispError, match=r"'n0_0\.JPEG' is no image of"):
        evaluate_knn(config(root, tmp_path, list_1pct=few), tiny_model(), alone())
    with pytest.raises(CrispError, match="nothing to score"):
        config(root, tmp_path, full=False)
    with pytest.raises(CrispError, match=r"k=\(0,\): must be different numbers"):
        config(root, tmp_path, k=(0,))


@pytest.mark.parametrize(
    ("command", "options"), [(command_knn, ["--k", "1", "3"]), (command_linear, ["--epochs", "1"])]
)
def test_the_commands_write_what_they_find(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, options: list[str]
) -> None:
    loaded: list[tuple[str, torch.device]] = []

    def load_frozen(source: str, *, device: torch.device) -> Any:
        loaded.append((source, device))
        return tiny_model()

    published = types.ModuleType("crisp.models.published")
    published.load_frozen = load_frozen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "crisp.models.published", published)
    if command is command_linear:
        options = [*options, "--global-batch", "6", "--heads", "crisp"]
    out = tmp_path / "out"
    command.main(
        ["--weights", "tiny:", "--data", str(root), "--out", str(out), "--cache", str(tmp_path / "cache"),
         "--device", "cpu", "--threads", "1", *options]
    )  # fmt: skip
    assert loaded == [("tiny:", torch.device("cpu"))]
    result = read_result(out / f"{command.TASK}-{root.name.lower()}.json")
    assert result.task == command.TASK
    assert 0 <= result.scores[0].value <= 100


def test_imagenette_scores_as_a_plain_chain_does(test_data: Path, tmp_path: Path) -> None:
    """A few of its images, read, resized and cut by PIL and compared one whole matrix at a time."""
    root = tmp_path / "few"
    for split, count in (("train", 8), ("val", 3)):
        for folder in sorted((test_data / "imagenette" / split).iterdir())[:4]:
            (root / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                (root / split / folder.name / image.name).symlink_to(image)
    model = tiny_model(dim=32, depth=2)
    (result,) = evaluate_knn(config(root, tmp_path, k=(1, 5)), model, alone())

    def plain(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        features, labels = [], []
        for label, folder in enumerate(sorted((root / split).iterdir())):
            for path in sorted(folder.iterdir()):
                with Image.open(path) as file:
                    image = file.convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)  # they are square
                pixels = torch.from_numpy(np.array(image.crop((16, 16, 240, 240)))).permute(2, 0, 1) / 255
                mean, std = (
                    torch.tensor(values)[:, None, None] for values in (model.backbone.mean, model.backbone.std)
                )
                cls = model.backbone(((pixels - mean) / std)[None], last=1)[-1].cls
                assert cls is not None
                features.append(cls[0])
                labels.append(label)
        return torch.stack(features), torch.tensor(labels)

    expected = knn_accuracy(*plain("train"), *plain("val"), k=(1, 5), classes=4)
    assert {score.settings["k"]: score.value for score in result.scores} == {
        k: pytest.approx(100 * value) for k, value in expected.items()
    }
