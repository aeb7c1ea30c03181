"""From the command line to the files of results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crisp.cli import main
from crisp.evals.segmentation import command_knn, command_linear
from tests.evals.segmentation import tiny_data as tiny

COMMANDS: dict[str, tuple[Any, list[str]]] = {
    "seg-knn": (command_knn, ["--ks", "1", "3", "--distances", "cosine"]),
    "seg-linear": (command_linear, ["--cs", "1", "10"]),
}


@pytest.mark.parametrize("task", COMMANDS)
def test_result_files(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, options = COMMANDS[task]
    sources = []

    def load(source: str, *, device: torch.device) -> Any:
        sources.append((source, device))
        return tiny.gray_model()

    monkeypatch.setattr(module, "load_frozen", load)
    monkeypatch.chdir(tmp_path)
    tiny.write_folder(tmp_path / "shapes", ids=(0, 1, 2, 9))
    for split in ("train", "val"):
        (tmp_path / "shapes/annotations" / split).rename(tmp_path / f"shapes/{split}-masks")
    arguments = [
        "eval", task, "--weights", "gray:x", "--data", "shapes", "--dataset", "folder", "--image-px",
        str(tiny.SIDE_PX), "--folder.masks", "{split}-masks", "--folder.ignored", "9", "255", "--out", "scores",
        "--cache", "features", "--device", "cpu", *options,
    ]  # fmt: skip
    assert main(arguments) == 0
    assert sources == [("gray:x", torch.device("cpu"))]
    result = json.loads((tmp_path / f"scores/{task}-shapes.json").read_text())
    assert (result["task"], result["dataset"]) == (task, "shapes")
    assert result["scores"][0]["value"] == 100
    assert result["settings"]["ignored"] == [9, 255]
    assert "100.0" in capsys.readouterr().out
    assert "100.0" in (tmp_path / f"scores/{task}-shapes.md").read_text()


@pytest.mark.parametrize("task", COMMANDS)
def test_a_mistake_is_one_line(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(COMMANDS[task][0], "load_frozen", lambda source, device: tiny.gray_model())
    assert main(["eval", task, "--weights", "w", "--data", str(tmp_path / "absent"), "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("crisp eval: ")
    assert "absent: there is no such folder" in line


@pytest.mark.parametrize("task", COMMANDS)
def test_help(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["eval", task, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for option in ("--weights", "--data", "--train-set", "--folder.images", "--allow-empty-classes"):
        assert option in text
