"""The whole command: with stand-ins for training and evaluation, and once, slowly, with the real ones."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crisp.ablate import command, evaluations, rows
from crisp.ablate.command import gpu_slots
from crisp.ablate.config import AblateConfig
from crisp.ablate.evaluations import evaluations_for
from crisp.ablate.rows import plan_rows
from crisp.ablate.table import make_table, table_lines, table_markdown
from crisp.cli import main
from crisp.errors import CrispError


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stand-ins were called with, a line each."""
    stand_in = (sys.executable, "-m", "tests.ablate.stand_in")
    monkeypatch.setattr(rows, "CRISP", stand_in)
    monkeypatch.setattr(evaluations, "CRISP", stand_in)
    monkeypatch.setattr(command, "_check_shards", lambda row: None)
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls"))
    (tmp_path / "calls").touch()
    return tmp_path / "calls"


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """An image and a mask; the stand-in does not look at them."""
    for folder, pixels in (("images", np.zeros((32, 32, 3), np.uint8)), ("annotations", np.eye(32, dtype=np.uint8))):
        (tmp_path / "shapes" / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "shapes" / folder / "0.png")
    return tmp_path / "shapes"


def run(tmp_path: Path, *options: str) -> int:
    arguments = ["ablate", "threshold", "--rows", "0.4", "0.75", "0.9", "--shards", "s", "--device", "cpu"]
    return main([*arguments, "--out", str(tmp_path / "out"), *options])


def test_rows_fail_alone_are_taken_up_again_and_end_in_the_table(
    tmp_path: Path, calls: Path, masked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "0.75")
    assert run(tmp_path, "--regions.data", str(masked)) == 1
    captured = capsys.readouterr()
    folder = tmp_path / "out/threshold"
    told = captured.err.strip().splitlines()[-1]
    assert told.startswith("crisp ablate: 0.75: training ended with status 1: crisp train: 0.75: the disk is full")
    assert str(folder / "logs/0.75.log") in told
    table = json.loads((folder / "table.json").read_text())
    assert [row["state"] == "complete" for row in table["rows"]] == [True, False, True]
    assert [row["ours"].get("online k-NN") for row in table["rows"]] == [40, None, 90]
    assert "- 0.75: 0.75: training ended" in (folder / "table.md").read_text()
    begun = calls.read_text().splitlines()
    assert [call.split()[0] for call in begun] == ["train", "eval", "train", "train", "eval"]

    monkeypatch.delenv("STAND_IN_FAILS")
    assert run(tmp_path, "--regions.data", str(masked)) == 0
    resumed, evaluated = calls.read_text().splitlines()[len(begun) :]
    assert resumed.startswith(f"train --resume {folder / '0.75'} --data.shards s")
    assert evaluated.startswith(f"eval region-quality --weights {folder / '0.75'} --data {masked}")
    table = json.loads((folder / "table.json").read_text())
    assert [row["state"] for row in table["rows"]] == ["complete"] * 3
    assert table["rows"][1]["ours"] == {
        "purity": 70, "purity, random": 40, "online k-NN": 75, "valid in training": 30,
    }  # fmt: skip
    assert (folder / "curve.png").stat().st_size > 1000
    assert "0.75" in capsys.readouterr().out
    curve = json.loads((folder / "curve.json").read_text())
    assert [(row["value"], row["default"]) for row in curve["rows"]] == [(0.4, False), (0.75, True), (0.9, False)]
    assert curve["rows"][1]["scores"] == table["rows"][1]["ours"]

    assert run(tmp_path, "--regions.data", str(masked)) == 0  # nothing is left to do
    assert len(calls.read_text().splitlines()) == len(begun) + 2


def test_dry_run_prints_commands_and_runs_none(tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.count("tests.ablate.stand_in train demo") == 3
    assert "--region.threshold 0.9" in out
    assert "min" in out
    assert not calls.read_text()
    assert not (tmp_path / "out").exists()


def test_the_plan_of_the_papers_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(
        ["ablate", "heads", "--scale", "paper", "--dry-run", "--shards", "s", "--init-weights", "ibot.pth", "--device",
         "cpu", "--out", str(tmp_path / "out")]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert status == 0
    assert out.count("train ablation_heads_") == 6
    assert "--init.weights ibot.pth" in out
    assert "Expected: 245 h of four RTX 3090" in out
    assert "980 GPU hours" in out


def test_beside_the_paper(tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "check_data", lambda config: None)
    common: dict[str, Any] = {"out": tmp_path / "out", "shards": "s", "voc": tmp_path, "device": "cpu"}
    config = AblateConfig(table="blocks", rows=("1", "2"), scale="paper", init_weights="none", **common)
    path = command.ablate(config)
    evaluation_calls = [call for call in calls.read_text().splitlines() if call.startswith("eval")]
    assert len(evaluation_calls) == 4
    assert all("--dataset voc2012 --train-set trainaug" in call for call in evaluation_calls)
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][:8] == ["row", "change", "VOC k-NN", "paper", "ours −", "VOC linear", "paper", "ours −"]
    assert cells[2][:8] == ["1", "region.concept_depth = 1", "50.0", "57.4", "−7.4", "60.0", "64.7", "−4.7"]
    assert cells[3][2:5] == ["50.0", "–", ""]
    assert "34.6" in path.read_text()
    rows_ = plan_rows(config)
    table = make_table(config, rows_, evaluations_for(config), {})
    assert table_markdown(table) == path.read_text()
    demo = make_table(AblateConfig(table="blocks", rows=("1",), **common), [], [], {})
    assert "no measure of the method" in table_markdown(demo)
    assert table_lines(demo)[1] == []


def test_groups_of_gpus() -> None:
    slots = gpu_slots(["0", "1", "5", "GPU-ab", "7"], 2)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0,1", "5,GPU-ab"]
    assert slots[0].options[0] == "--data.threads"
    assert int(slots[0].options[1]) >= 1
    assert gpu_slots(["3"], 1)[0].options == ()
    with pytest.raises(CrispError, match="gpus_per_row=3: there are 2 GPUs"):
        gpu_slots(["0", "1"], 3)


def test_data_that_is_not_there_is_said_before_anything_runs(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, word in (
        (("--voc", str(tmp_path / "voc")), "voc"),
        (("--regions.data", str(tmp_path / "masks")), "masks: there is no such folder"),
        (("--imagenet", str(tmp_path), "--list-10pct", "x"), "no folder train"),
    ):
        assert run(tmp_path, *options) == 1
        assert word in capsys.readouterr().err
    assert not calls.read_text()


@pytest.mark.slow
def test_the_demo_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ablate", "warp", "--rows", "centre", "forward", "--epochs", "1", "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    table = json.loads((tmp_path / "out/warp/table.json").read_text())
    assert [row["state"] for row in table["rows"]] == ["complete", "complete"]
    for row in table["rows"]:
        assert set(row["ours"]) == {"online k-NN", "valid in training"}
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/warp").rglob("*.safetensors")}
    assert main(arguments) == 0
    assert first == {path: path.stat().st_mtime_ns for path in first}
    assert "training begins" not in capsys.readouterr().err
