"""Models whose scores are known beforehand, in every official layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crisp.distributed import World
from crisp.evals.results import Result, result_json
from crisp.evals.running import evaluation_world
from crisp.evals.segmentation import bank
from crisp.evals.segmentation.command_knn import evaluate_knn
from crisp.evals.segmentation.command_linear import evaluate_linear
from crisp.evals.segmentation.config import SegKnnConfig, SegLinearConfig
from crisp.evals.segmentation.folder import FolderLayout
from tests.evals.segmentation import tiny_data as tiny
from tests.ranks import in_ranks

ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))


def knn(root: Path, cache: Path, *, perfect: bool = True, **options: Any) -> Result:
    options.setdefault("dataset", "folder")
    config = SegKnnConfig(weights="gray:", data=root, cache=cache, image_px=tiny.SIDE_PX, **options)
    return evaluate_knn(config, tiny.gray_model(perfect=perfect), ALONE)


def linear(root: Path, cache: Path, *, perfect: bool = True, **options: Any) -> Result:
    options.setdefault("dataset", "folder")
    config = SegLinearConfig(weights="gray:", data=root, cache=cache, image_px=tiny.SIDE_PX, **options)
    return evaluate_linear(config, tiny.gray_model(perfect=perfect), ALONE)


LAYOUTS: dict[str, tuple[Callable[[Path], Path], int, dict[str, Any]]] = {
    "ade20k": (tiny.write_ade20k, 150, {"dataset": "ade20k"}),
    "voc2012": (tiny.write_voc2012, 21, {"dataset": "voc2012", "train_set": "train"}),
    "cityscapes": (tiny.write_cityscapes, 19, {"dataset": "cityscapes"}),
    "folder": (tiny.write_folder, 4, {}),
}
"""How it is written, and its classes, all equally often in train and in val"""


@pytest.mark.parametrize("name", LAYOUTS)
def test_perfect_features_give_100_and_constant_ones_the_floor(name: str, tmp_path: Path) -> None:
    """Constant features give every patch the label of one class c, whichever it is. Its IoU is the share of c, 1/C, the
    IoU of the other C − 1 is 0: together 1/C²."""
    write, classes, options = LAYOUTS[name]
    write(tmp_path / "data")
    # Of the one class in some places more than three patches may be missing in the nine tenths that are fitted on.
    few = {"ks": (1, 3)}
    c = {"cs": (100.0,)}
    for perfect, expected in ((True, 100), (False, 100 / classes**2)):
        results = (
            knn(tmp_path / "data", tmp_path / "cache", perfect=perfect, **options, **few),
            linear(tmp_path / "data", tmp_path / "cache", perfect=perfect, **options, **c),
        )
        for result in results:
            assert result.scores[0].value == pytest.approx(expected, abs=1e-9)
            assert result.dataset == (name if name != "folder" else "data")
    assert result.settings["train"]["images"] == result.settings["val"]["images"] or name == "folder"


def test_the_floor_of_a_linear_model_is_the_most_frequent_class(tmp_path: Path) -> None:
    """Without features only the intercepts are left, whose optimum are the classes' frequencies in train: label 1 has
    half of the patches, and of val's, too. Its IoU is 1/2, those of the two others 0."""
    root = tiny.write_folder(tmp_path / "data", ids=(0, 1, 1, 2), train=12, val=8)
    result = linear(root, tmp_path / "cache", perfect=False, cs=(1.0,))
    assert result.scores[0].value == pytest.approx(100 * (1 / 2) / 3, abs=1e-9)


def test_a_neighbour_carries_the_pixels_of_its_patch(tmp_path: Path) -> None:
    """Mixed patches, each with features of its own: k-NN repeats their pixels, ignored ones of the truth are left out,
    and a linear model cannot."""
    root = tiny.write_folder(tmp_path / "data", ids=range(4))
    rng = np.random.default_rng(3)
    inside = rng.choice([0, 1, 2, 3, 255], p=[0.3, 0.3, 0.2, 0.1, 0.1], size=(4, tiny.PATCH_PX, tiny.PATCH_PX))
    for path in sorted((root / "annotations").rglob("*.png")):
        grid = np.asarray(Image.open(path))[:: tiny.PATCH_PX, :: tiny.PATCH_PX]
        blocks = inside[grid].transpose(0, 2, 1, 3).reshape(tiny.SIDE_PX, tiny.SIDE_PX)
        Image.fromarray(blocks.astype(np.uint8)).save(path)
    assert knn(root, tmp_path / "cache", ks=(1, 3)).scores[0].value == 100
    assert linear(root, tmp_path / "cache", cs=(1.0,)).scores[0].value < 50


def test_an_ignored_label_that_neighbours_carry_adds_a_class(tmp_path: Path) -> None:
    """A quarter of every patch of train is ignored, in val all is labelled. What is predicted there has no hits, but is
    averaged: the IoU of the four labels is 3/4, that of a fifth is 0."""
    root = tiny.write_folder(tmp_path / "data", ids=range(4))
    for path in sorted((root / "annotations/train").iterdir()):
        ids = np.asarray(Image.open(path)).copy()
        ids[np.arange(tiny.SIDE_PX) % tiny.PATCH_PX < tiny.PATCH_PX // 4] = 255
        Image.fromarray(ids).save(path)
    result = knn(root, tmp_path / "cache", ks=(3,), distances=("l2",))
    assert result.scores[0].value == pytest.approx(100 * 4 * 0.75 / 5)


def test_choices(tmp_path: Path) -> None:
    """Perfect features: every choice scores 100 on the held-out tenth, and the first one is taken, k outer."""
    root = tiny.write_folder(tmp_path / "data")
    result = knn(root, tmp_path / "cache", ks=(3, 1, 10), distances=("l2", "cosine"))
    assert result.chosen == {"k": 3, "distance": "l2"}
    assert [(s.settings["k"], s.settings["distance"]) for s in result.scores[1:]] == [
        (k, distance) for k in (3, 1, 10) for distance in ("l2", "cosine")
    ]
    assert {s.value for s in result.scores} == {100}
    result = linear(root, tmp_path / "cache", cs=(10.0, 1.0))
    assert result.chosen == {"C": 10.0}
    assert [s.settings["C"] for s in result.scores] == [10.0, 10.0, 1.0]


def test_no_search_for_one_choice(tmp_path: Path) -> None:
    """Then fewer than ten images do, and nothing is said to have been chosen."""
    root = tiny.write_folder(tmp_path / "data", train=4)
    for result in (
        knn(root, tmp_path / "cache", ks=(1,), distances=("cosine",)),
        linear(root, tmp_path / "cache", cs=(1.0,)),
    ):
        assert (len(result.scores), result.chosen, result.settings["held_out_images"]) == (1, {}, 0)
        assert result.scores[0].value == 100


def test_type_of_the_search(tmp_path: Path) -> None:
    tiny.write_ade20k(tmp_path / "ade")
    tiny.write_folder(tmp_path / "folder")
    assert knn(tmp_path / "ade", tmp_path / "cache", dataset="ade20k", ks=(1,)).settings["dtype"] == "bf16"
    assert knn(tmp_path / "folder", tmp_path / "cache").settings["dtype"] == "fp32"
    assert knn(tmp_path / "folder", tmp_path / "cache", dtype="bf16").settings["dtype"] == "bf16"


def test_the_capi_list_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    voc = tiny.write_voc2012(tmp_path / "data")
    tiny.write_sbd(voc, tmp_path / "data", png=False)
    options = {"dataset": "voc2012", "ks": (1,), "distances": ("l2",)}
    result = knn(tmp_path / "data", tmp_path / "cache", train_set="capi", **options)
    assert "are in VOC val" in caplog.text
    assert "2 of its 26 images are in VOC val" in result.settings["note"]
    assert result.settings["train"]["split"] == "capi"
    note = knn(tmp_path / "data", tmp_path / "cache", **options).settings["note"]
    assert "are in VOC val" not in note
    assert "PASCAL VOC 2012 val has 21 images, as published it has 1449" in note


def test_two_runs_write_the_same(tmp_path: Path) -> None:
    root = tiny.write_folder(tmp_path / "data")
    for evaluate, options in ((knn, {}), (linear, {"cs": (0.1, 10.0)})):
        texts = {result_json(evaluate(root, tmp_path / f"cache-{i}", **options)) for i in range(2)}
        texts.add(result_json(evaluate(root, tmp_path / "cache-0", **options)))  # from cached features
        texts.add(result_json(evaluate(root, tmp_path / "cache-2", batch=5, threads=1, **options)))
        assert len(texts) == 1


def test_the_seed_draws_another_tenth(tmp_path: Path) -> None:
    root = tiny.write_folder(tmp_path / "data")
    assert knn(root, tmp_path / "cache", seed=1).settings["seed"] == 1


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    """20 images in chunks of 4: what the first try finished is not computed again, nor anything by the other task."""
    root = tiny.write_folder(tmp_path / "data", train=12, val=8)
    config = SegKnnConfig(
        weights="gray:", data=root, cache=tmp_path / "cache", image_px=tiny.SIDE_PX, dataset="folder", batch=1, ks=(1,)
    )
    with pytest.raises(KeyboardInterrupt):
        evaluate_knn(config, tiny.gray_model(fails_after=10), ALONE)
    model = tiny.gray_model()
    result = evaluate_knn(config, model, ALONE)
    assert model.backbone.seen == 20 - 8
    assert result_json(result) == result_json(knn(root, tmp_path / "other", ks=(1,)))
    model = tiny.gray_model()
    linear_config = SegLinearConfig(
        weights="gray:", data=root, cache=tmp_path / "cache", image_px=tiny.SIDE_PX, dataset="folder", cs=(1.0,)
    )
    evaluate_linear(linear_config, model, ALONE)
    assert model.backbone.seen == 0


def _both(root: str, cache: str) -> list[str]:
    shared: dict[str, Any] = {
        "weights": "gray:", "data": Path(root), "cache": Path(cache), "image_px": tiny.SIDE_PX, "dataset": "folder",
        "folder": FolderLayout(ignored=(3,)), "batch": 2, "device": "cpu",
    }  # fmt: skip
    by_neighbours = SegKnnConfig(ks=(1, 3), **shared)
    by_regression = SegLinearConfig(cs=(0.1, 1.0, 10.0), max_iter=50, **shared)
    texts = []
    with evaluation_world(by_neighbours) as world:
        for perfect in (
            True,
            False,
        ):  # a constant model's neighbours are all ties: what differs between ranks would show
            model = tiny.gray_model(perfect=perfect)
            texts.append(result_json(evaluate_knn(by_neighbours, model, world)))
            texts.append(result_json(evaluate_linear(by_regression, model, world)))
    return texts


def test_features_that_do_not_fit_in_memory_are_read_for_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    root = tiny.write_folder(tmp_path / "data")
    expected = result_json(linear(root, tmp_path / "cache", cs=(0.1, 1.0)))
    assert "do not fit in memory" not in caplog.text
    monkeypatch.setattr(bank, "free_bytes", lambda device: 1000)
    assert result_json(linear(root, tmp_path / "cache", cs=(0.1, 1.0))) == expected
    assert "176 features do not fit in memory" in caplog.text


@pytest.mark.slow
def test_ranks_share_the_work_and_find_the_same(tmp_path: Path) -> None:
    root = tiny.write_folder(tmp_path / "data", train=23, val=7, ids=(0, 1, 1, 2, 3, 3, 3, 0))
    alone = in_ranks(_both, 1, tmp_path / "one", str(root), str(tmp_path / "cache-1"))
    two = in_ranks(_both, 3, tmp_path / "three", str(root), str(tmp_path / "cache-3"))
    assert two == alone * 3


def test_settings_hold_the_protocol(tmp_path: Path) -> None:
    root = tiny.write_folder(tmp_path / "data")
    settings = knn(root, tmp_path / "cache").settings
    assert {name: settings[name] for name in ("image_px", "seed", "precision", "ignored", "ks", "distances")} == {
        "image_px": tiny.SIDE_PX,
        "seed": 0,
        "precision": "float32",
        "ignored": [255],
        "ks": [1, 3, 10, 30],
        "distances": ["cosine", "l2"],
    }
    assert settings["bank_patches"] == 12 * tiny.PATCHES
    settings = linear(root, tmp_path / "cache", cs=(1.0,)).settings
    assert {name: settings[name] for name in ("max_iter", "tol", "history", "line_search")} == {
        "max_iter": 1000,
        "tol": 1e-12,
        "history": 5,
        "line_search": 50,
    }
