"""The k-NN benchmark on a tiny bank: that it measures what it says, not how fast anything is."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from crisp.benchmarks import knn as bench
from crisp.benchmarks.knn import KnnBenchConfig, differing, main, make_features, make_labels
from crisp.cli import BENCHMARKS
from crisp.errors import CrispError

TINY = ["--keys", "300", "--queries", "20", "--width", "16", "--patch-px", "2", "--rounds", "3", "--parts", "1"]


def test_it_prints_and_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "knn" in BENCHMARKS
    main([*TINY, "--full", "500", "--folder", str(tmp_path), "--json", str(tmp_path / "knn.json")])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "knn.json").read_text())
    compared = written["compared"]
    assert {name: len(times) for name, times in compared["processor_s"].items()} == {
        name: 3 if name in ("plain", "fast") else 1 for name in compared["processor_s"]
    }
    assert all(value > 0 for values in compared["processor_s"].values() for value in values)
    assert set(compared["ratios"]) == {"all", "search", "votes"}
    assert compared["pixels"] == 20 * 4 * 8
    assert compared["different"]["float64"] == 0
    assert "fast and plain in float64: 0" in printed
    assert "256 queries against 500 × 16 patches" in printed
    assert 0 < written["full"]["own_before_gb"] <= written["full"]["own_peak_gb"] <= written["full"]["peak_rss_gb"]
    assert [path.name for path in tmp_path.iterdir()] == ["knn.json"], "the bank on disk is left behind"


def test_a_form_that_predicts_otherwise_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = bench.predict_pixels_grid

    def off_by_one(*args: object, **options: object) -> dict[object, torch.Tensor]:
        return {key: pixels + 1 for key, pixels in real(*args, **options).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "predict_pixels_grid", off_by_one)
    main([*TINY, "--rounds", "1"])
    assert "fast and plain in float64: 640" in capsys.readouterr().out


def test_own_memory_sees_a_passing_peak() -> None:
    with bench.OwnMemory() as own:
        held = np.ones(50_000_000, np.uint8)
        time.sleep(0.1)
        del held
    assert 0.04 < own.peak_gb - own.before_gb < 0.2


def test_differing_counts_pixels() -> None:
    one = {1: torch.tensor([[1, 2]]), 3: torch.tensor([[3, 4]])}
    assert differing(one, {1: torch.tensor([[1, 0]]), 3: torch.tensor([[0, 0]])}) == 3


def test_data_are_of_the_seed() -> None:
    assert torch.equal(make_features(50, 8, 1), make_features(50, 8, 1))
    assert not torch.equal(make_features(50, 8, 1), make_features(50, 8, 2))
    labels = make_labels(50, 16, 1)
    assert labels.dtype == torch.uint8
    assert (labels[:, 3:] == labels[:, 3:4]).all()
    assert not (labels[:, :3] == labels[:, 3:4]).all()


@pytest.mark.parametrize("args", [["--rounds", "0"], ["--keys", "29"], ["--full", "29"], ["--threads", "0"]])
def test_mistakes_are_named(args: list[str]) -> None:
    with pytest.raises(CrispError, match=args[0].removeprefix("--")):
        main(args)
    with pytest.raises(CrispError, match="no such folder"):
        main([*TINY, "--json", "/nowhere/knn.json"])


def test_no_bank_on_disk_without_being_asked() -> None:
    assert KnnBenchConfig().full == 0
