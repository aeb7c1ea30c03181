"""Whole evaluations: known answers, the same regions as training, the same JSON twice."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crisp.cli import main
from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.region_quality import command
from crisp.evals.region_quality.config import RegionQualityConfig
from crisp.evals.region_quality.evaluate import evaluate_region_quality
from crisp.evals.region_quality.scores import mean_gain
from crisp.evals.results import Result, read_result, result_json
from crisp.models.frozen import FrozenModel
from tests.evals.region_quality.oracle import GRID, SIDE_PX, oracle_model, striped_mask, write_masked

ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six images of two segments each."""
    return write_masked(tmp_path / "Stripes", [striped_mask(number % 3) for number in range(6)])


def score(data: Path, model: FrozenModel, *, cache: str = "cache", **options: Any) -> Result:
    config = RegionQualityConfig(
        weights=model.source, data=data, cache=data.parent / cache, **{"reference_px": SIDE_PX, **options}
    )
    return evaluate_region_quality(config, model, ALONE)


def of(result: Result, metric: str, regions: str = "found", **settings: Any) -> float:
    wanted = {"regions": regions, **settings}
    matching = [s.value for s in result.scores if s.metric == metric and wanted.items() <= s.settings.items()]
    assert len(matching) == 1, (metric, wanted, matching)
    return matching[0]


def test_tokens_that_know_the_segments(data: Path) -> None:
    result = score(data, oracle_model(), thresholds=(0.75,))
    assert of(result, "purity") == of(result, "overlap") == 100
    seeds_left = 100 * of(result, "size") / 100  # both segments hold half of the patches
    assert seeds_left == 50
    # In pixels: two columns of patches against a segment of 36, 37 or 38 of 64 pixels' width, or the rest of it.
    left, right = ([min(32, w) / max(32, w) for w in widths] for widths in ((36, 37, 38), (28, 27, 26)))
    assert min(left + right) < of(result, "overlap-px") / 100 < max(left + right)
    assert of(result, "boundary-recall") == 100  # at most 6 px off, of 8
    tight = score(data, oracle_model(), thresholds=(0.75,), boundary_px=3)
    assert of(tight, "boundary-recall") == of(tight, "boundary-precision") == 0
    for kind in ("blob", "scattered"):
        assert of(result, "purity", kind) < 90
        assert of(result, "size", kind) == of(result, "size")
    assert of(result, "overlap", "blob") > of(result, "overlap", "scattered")


def test_the_patch_overlap_of_one_segment(tmp_path: Path) -> None:
    mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    mask[:40, :40] = 1  # 2.5 × 2.5 patches: the half patches tie, and ties go to 0
    data = write_masked(tmp_path / "Corner", [mask])
    result = score(data, oracle_model(), seeds_per_image=64)
    inside, outside = 32 * 32 / 40**2, (64**2 - 40**2) / (64**2 - 32**2)
    seeds = (of(result, "size") / 100 - 12 / 16) / (4 / 16 - 12 / 16)  # share of the seeds that fell into the corner
    assert 0 < seeds < 1
    assert of(result, "overlap-px") == pytest.approx(100 * (seeds * inside + (1 - seeds) * outside), abs=1e-3)


def test_tokens_that_know_nothing(data: Path) -> None:
    result = score(data, oracle_model(constant=True))
    assert of(result, "size") == 100
    assert of(result, "purity") == of(result, "overlap") == 50  # the segment's share
    for kind in ("blob", "scattered"):  # the whole image, too
        assert of(result, "purity", kind) == 50


def test_every_combination_and_the_papers_own_first(data: Path) -> None:
    options = {
        "thresholds": (0.5, 0.75), "blocks": (1, 2), "seed_policies": ("visible", "uniform"),
        "warp_modes": ("forward", "centre", "coverage"), "seeds_per_image": 3,
    }  # fmt: skip
    result = score(data, oracle_model(), **options)
    first = result.headline()
    assert first["purity"].settings == {
        "regions": "found", "threshold": 0.75, "blocks": 2, "seed_policy": "uniform",
    }  # fmt: skip
    assert first["valid"].settings["warp_mode"] == "centre"
    told = {tuple(s.settings.items()) for s in result.scores if s.metric == "valid"}
    assert len(told) == 3 * 2 * 2 * 2 * 3
    visible, uniform = (
        of(result, "valid", seed_policy=policy, threshold=0.5, blocks=1, warp_mode="centre")
        for policy in ("visible", "uniform")
    )
    assert visible >= uniform


def test_the_same_json_whatever_the_batch_and_once_interrupted(data: Path) -> None:
    whole = result_json(score(data, oracle_model(), cache="a", batch=6))
    assert result_json(score(data, oracle_model(), cache="b", batch=1, threads=1)) == whole
    model = oracle_model()
    score(data, model, cache="c")
    seen = model.backbone.seen  # type: ignore[attr-defined]
    assert result_json(score(data, model, cache="c")) == whole
    assert model.backbone.seen == seen  # type: ignore[attr-defined]
    other = score(data, oracle_model(), cache="a", seed=1)
    assert of(other, "valid") != of(read_result_of(whole, data.parent), "valid")


def read_result_of(text: str, folder: Path) -> Result:
    path = folder / "result.json"
    path.write_text(text)
    return read_result(path)


def test_gains_are_means_over_images() -> None:
    found = np.array([[0.5, 0.7], [0.9, -1.0], [-1.0, -1.0]])
    other = np.array([[0.4, 0.4], [0.5, -1.0], [-1.0, -1.0]])
    gain, error = mean_gain(found, other)
    assert gain == pytest.approx((0.2 + 0.4) / 2)
    assert error == pytest.approx(np.std([0.2, 0.4], ddof=1) / np.sqrt(2))
    assert mean_gain(found[:1], other[:1]) == (pytest.approx(0.2), None)
    assert mean_gain(found[2:], other[2:]) == (None, None)


def test_the_gain_is_the_difference_of_means_where_every_region_counts(data: Path) -> None:
    result = score(data, oracle_model())
    gain = next(s for s in result.scores if s.metric == "purity-gain")
    assert gain.value == pytest.approx(of(result, "purity") - of(result, "purity", "blob"), abs=1e-3)
    assert gain.std is not None
    assert gain.std > 0


def test_fewer_images(data: Path) -> None:
    result = score(data, oracle_model(), max_images=2, seeds_per_image=3)
    assert (result.settings["images"], result.settings["regions"]) == (2, 6)
    assert score(data, oracle_model(), max_images=99).settings["images"] == 6


def test_masks_in_folders_of_their_own(tmp_path: Path) -> None:
    masks = [np.where(striped_mask(0) == 1, 0, 255).astype(np.uint8)]
    for clip in ("a", "b"):
        write_masked(tmp_path / "clips", masks, below=clip)
    result = score(tmp_path / "clips", oracle_model(), ignored=())
    assert result.settings["images"] == 2
    assert of(result, "purity") == 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": "train"}, ("train: there is no such folder", "--images")),
        ({"ignored": (1, 255)}, ("labels [1, 2]", "nothing to tell apart", "--ignored")),
        ({"blocks": (3,)}, ("blocks=(3,)", "2 blocks")),
        ({"reference_px": 60}, ("reference_px=60", "16 px")),
    ],
)
def test_mistakes_are_found_before_the_model_runs(data: Path, options: dict[str, Any], words: tuple[str, ...]) -> None:
    model = oracle_model()
    with pytest.raises(CrispError) as caught:
        score(data, model, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert model.backbone.seen == 0  # type: ignore[attr-defined]


def test_a_missing_mask_is_named(data: Path) -> None:
    (data / "annotations/3.png").unlink()
    with pytest.raises(CrispError, match=r"3\.png: is missing"):
        score(data, oracle_model())


@pytest.mark.parametrize(
    "options",
    [{"thresholds": (2.0,)}, {"blocks": (0,)}, {"seeds_per_image": 0}, {"thresholds": (0.5, 0.5)}, {"ignored": (256,)}],
)
def test_choices_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(CrispError, match=next(iter(options))):
        RegionQualityConfig(weights="w", data=Path("d"), **options)


def test_the_command_writes_both_files(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "load_frozen", lambda source, device: oracle_model())
    arguments = [
        "eval", "region-quality", "--weights", "oracle:", "--data", str(data), "--reference-px", str(SIDE_PX),
        "--thresholds", "0.75", "0.9", "--warp-modes", "centre", "forward", "--out", str(tmp_path / "out"), "--cache",
        str(tmp_path / "cache"), "--device", "cpu",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "out/region-quality-stripes.md").read_text()
    table = [line for line in written.splitlines() if line.startswith("|")]
    assert all(line in printed.splitlines() for line in table)
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["discovered", "random, connected", "random patches"]
    assert "β 0.75, M 2, uniform" in table[2]
    assert "valid, forward" in table[0]
    assert len(table) == 2 + 2 * 3
    result = json.loads((tmp_path / "out/region-quality-stripes.json").read_text())
    assert (result["task"], result["scores"][0]["value"]) == ("region-quality", 100)
    assert result["settings"]["regions"] == 6 * 8
    assert result["settings"]["reference_px"] == GRID * 16
