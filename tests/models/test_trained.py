"""Networks read back from runs and checkpoints, and what is said where there are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crisp.checkpoint import list_checkpoints, save_checkpoint
from crisp.config import TrainConfig
from crisp.errors import CrispError
from crisp.models.student_teacher import StudentTeacher
from crisp.models.trained import load_trained
from crisp.runs import CHECKPOINTS, CONFIG_FILE, create_run, read_run_config

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def run(tmp_path: Path, configs: Any) -> Path:
    """A run's folder with checkpoints of steps 1 and 2."""
    config = TrainConfig(
        recipe="test", out=tmp_path / "run", model=configs.model(), region=configs.region(), views=configs.views
    )
    create_run(config)
    for step in (1, 2):
        save_checkpoint(
            tmp_path / "run" / CHECKPOINTS, content(config, step), {}, step=step, doomed=lambda steps: steps[:-2]
        )
    return tmp_path / "run"


def content(config: TrainConfig, step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    pair = StudentTeacher(config.model, config.region, config.views)
    for parameter in pair.parameters():
        parameter.data = torch.randn_like(parameter)
    return {name: getattr(pair, name).state_dict(keep_vars=True) for name in ("student", "teacher")}


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
    state_file = run / CHECKPOINTS / "step-00000002" / which / SHARD
    state_file.write_bytes(state_file.read_bytes()[:-1])
    assert load_trained(run, which=which).step == 1


def test_one_checkpoint_by_its_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run / CHECKPOINTS / "step-00000001"
    (tmp_path / "link").symlink_to(first)
    monkeypatch.chdir(first)
    for path in (first, tmp_path / "link", Path()):
        assert load_trained(path).step == 1
    (first / "teacher" / SHARD).unlink()
    with pytest.raises(CrispError, match=r"safetensors: missing"):
        load_trained(first)


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
    save_checkpoint(folder, {"student": {"a": torch.zeros(1)}}, {}, step=3, doomed=lambda steps: steps[:-1])
    with pytest.raises(CrispError, match=r"step-00000003: holds no teacher"):
        load_trained(run)
    config = json.loads((run / CONFIG_FILE).read_text())
    assert config["model"]["depth"] == 2
    save_checkpoint(folder, content(read_run_config(run), 4), {}, step=4, doomed=lambda steps: steps[:-1])
    config["model"]["depth"] = 3
    (run / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CrispError, match="a checkpoint of another architecture"):
        load_trained(run)
    for checkpoint in list_checkpoints(folder):
        (checkpoint / "checkpoint.json").unlink()
    with pytest.raises(CrispError, match="no checkpoint yet; go on with 'crisp train --resume"):
        load_trained(run)
