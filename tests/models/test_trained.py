"""Networks read back from runs and checkpoints, and what is said where there are none."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from crisp.checkpoint import STATE_FILE, list_checkpoints, save_checkpoint
from crisp.config import TrainConfig
from crisp.errors import CrispError
from crisp.models.student_teacher import StudentTeacher
from crisp.models.trained import load_trained
from crisp.runs import CHECKPOINTS, CONFIG_FILE, create_run, read_run_config


@pytest.fixture
def run(tmp_path: Path, configs: Any) -> Path:
    """A run's folder with checkpoints of steps 1 and 2."""
    config = TrainConfig(
        recipe="test", out=tmp_path / "run", model=configs.model(), region=configs.region(), views=configs.views
    )
    create_run(config)
    for step in (1, 2):
        save_checkpoint(tmp_path / "run" / CHECKPOINTS, content(config, step), step=step, keep=2)
    return tmp_path / "run"


def content(config: TrainConfig, step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    pair = StudentTeacher(config.model, config.region, config.views)
    for parameter in pair.parameters():
        parameter.data = torch.randn_like(parameter)
    return {"step": step, "student": pair.student.state_dict(), "teacher": pair.teacher.state_dict()}


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_the_newest_whole_checkpoint_of_a_run(run: Path, which: Any) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    trained = load_trained(run, which=which)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (trained.step, trained.which, trained.checkpoint) == (2, which, run / CHECKPOINTS / "step-00000002")
    assert trained.config.out == run
    want = content(trained.config, 2)[which]
    got = trained.network.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert not trained.network.training
    assert not any(parameter.requires_grad for parameter in trained.network.parameters())
    state_file = run / CHECKPOINTS / "step-00000002" / STATE_FILE
    state_file.write_bytes(state_file.read_bytes()[:-1])
    assert load_trained(run, which=which).step == 1


def test_one_checkpoint_by_its_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run / CHECKPOINTS / "step-00000001"
    (tmp_path / "link").symlink_to(first)
    monkeypatch.chdir(first)
    for path in (first, tmp_path / "link", Path()):
        assert load_trained(path).step == 1
    (first / STATE_FILE).unlink()
    with pytest.raises(CrispError, match=r"state\.pt: missing"):
        load_trained(first)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_nothing_is_unpickled(run: Path, tmp_path: Path) -> None:
    state: dict[str, Any] = {"step": 3, "teacher": Malicious(tmp_path / "ran")}
    save_checkpoint(run / CHECKPOINTS, state, step=3, keep=3)
    for path in (run, run / CHECKPOINTS / "step-00000003"):
        with pytest.raises(CrispError, match="could run code and is not loaded"):
            load_trained(path)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_trained_network(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / CHECKPOINTS / "step-1").mkdir(parents=True)
    cases = {
        tmp_path / "nowhere": "nowhere: no such folder; give a run",
        tmp_path / "empty": "empty: neither a run",
        run / CHECKPOINTS: "neither a run",
        tmp_path / CHECKPOINTS / "step-1": "no config.json",
    }
    for path, words in cases.items():
        with pytest.raises(CrispError, match=words) as caught:
            load_trained(path)
        assert "\n" not in str(caught.value)


def test_checkpoints_that_do_not_fit(run: Path) -> None:
    folder = run / CHECKPOINTS
    for state in ({"step": 3, "teacher": {"a": 1}}, {"step": 3}, {"teacher": {}}):
        save_checkpoint(folder, state, step=3, keep=1)
        with pytest.raises(CrispError, match=r"step-00000003: holds no teacher's tensors, or no step"):
            load_trained(run)
    config = json.loads((run / CONFIG_FILE).read_text())
    assert config["model"]["depth"] == 2
    save_checkpoint(folder, content(read_run_config(run), 4), step=4, keep=1)
    config["model"]["depth"] = 3
    (run / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CrispError, match="a checkpoint of another architecture"):
        load_trained(run)
    for checkpoint in list_checkpoints(folder):
        (checkpoint / "checkpoint.json").unlink()
    with pytest.raises(CrispError, match="no checkpoint yet; go on with 'crisp train --resume"):
        load_trained(run)
