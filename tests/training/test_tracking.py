"""Weights & Biases: missing, offline, and continued by a resumed run."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from crisp.config import WandbConfig
from crisp.errors import CrispError
from crisp.trainer import train
from crisp.training.tracking import ID_FILE
from tests.test_trainer import shards, tiny

__all__ = ["shards"]  # a fixture


def test_a_missing_package_is_refused_before_the_run_begins(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(CrispError, match=r"pip install 'crisp-ssl\[wandb\]'"):
        train(replace(tiny(shards, tmp_path / "run"), wandb=WandbConfig(project="p")))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_offline_and_continued_under_the_same_id(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra 'wandb'")
    monkeypatch.setenv("WANDB_MODE", "offline")  # nothing leaves, whatever the code does
    config = tiny(shards, tmp_path / "run")
    config = replace(config, wandb=WandbConfig(project="p", mode="offline"))
    run = train(config)
    first = json.loads((run / ID_FILE).read_text())["id"]
    for checkpoint in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    train(config, resume=True)
    assert json.loads((run / ID_FILE).read_text())["id"] == first
    folders = [path for path in (run / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert folders
    assert all(path.name.endswith(f"-{first}") for path in folders)
