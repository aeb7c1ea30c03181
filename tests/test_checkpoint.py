"""Checkpoints are whole or absent, and say what is wrong with them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from crisp.checkpoint import (
    list_checkpoints,
    load_into,
    load_module_state,
    load_newest,
    load_weights,
    save_checkpoint,
    stored_tensors,
)
from crisp.errors import CrispError

STUDENT = "student/shard-00001-model-00001-of-00001.safetensors"


def save(folder: Path, *, step: int, keep: int = 1, **tensors: torch.Tensor) -> Path:
    return save_checkpoint(folder, {"student": tensors}, {"step": step}, step=step, doomed=lambda steps: steps[:-keep])


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step=step, keep=2, x=torch.full((3,), float(step)), scalar=torch.tensor(step))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest.path == list_checkpoints(tmp_path)[-1]
    assert newest.values == {"step": 10}
    state = load_module_state(newest.path, "student")
    assert torch.equal(state["x"], torch.full((3,), 10.0))
    assert torch.equal(state["scalar"], torch.tensor(10))


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, step=5, x=torch.tensor(1))
    final = save(tmp_path, step=5, x=torch.tensor(2))
    assert load_module_state(final, "student")["x"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: os.truncate(p / STUDENT, 100), "truncated"),
        (lambda p: (p / STUDENT).unlink(), "missing"),
        (lambda p: (p / "values.json").unlink(), "missing"),
        (lambda p: (p / "checkpoint.json").write_text("{"), "unreadable"),
        (lambda p: (p / "checkpoint.json").write_text("[]"), "unreadable"),
        (lambda p: _flip_a_byte(p / STUDENT), "SHA-256"),
        (lambda p: _flip_a_byte(p / "values.json"), "SHA-256"),
        (lambda p: shutil.copy(p / STUDENT, p / STUDENT.replace("00001-model", "00002-model")), "added or altered"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path: Path, damage, words: str) -> None:
    checkpoint = save(tmp_path, step=1, x=torch.zeros(1000))
    damage(checkpoint)
    with pytest.raises(CrispError, match=words) as caught:
        load_module_state(checkpoint, "student")
    assert "\n" not in str(caught.value)
    assert "delete" in str(caught.value)
    with pytest.raises(CrispError, match=rf"none of 1 checkpoints is whole; the newest: .*{words}"):
        load_newest(tmp_path)


def test_one_part_is_read_without_the_others(tmp_path: Path) -> None:
    parts = {"student": {"x": torch.zeros(9)}, "teacher": {"x": torch.ones(9)}}
    checkpoint = save_checkpoint(tmp_path, parts, {}, step=1, doomed=lambda steps: steps[:-1])
    _flip_a_byte(checkpoint / STUDENT)
    assert torch.equal(load_module_state(checkpoint, "teacher")["x"], torch.ones(9))
    with pytest.raises(CrispError, match="holds no optimizer"):
        load_module_state(checkpoint, "optimizer")


class Tied(nn.Module):
    """Two names for one layer, or two layers."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.b = self.a if tied else nn.Linear(2, 3)


def test_what_is_shared_is_stored_once_and_loaded_under_every_name(tmp_path: Path) -> None:
    model, other = Tied(tied=True), Tied(tied=True)
    checkpoint = save(tmp_path, step=1, **model.state_dict(keep_vars=True))
    assert set(stored_tensors(checkpoint, "student")) == {"a.weight", "a.bias"}
    load_weights(other, load_module_state(checkpoint, "student"), source=checkpoint)
    assert torch.equal(other.b.weight, model.a.weight)

    into = Tied(tied=True)
    load_into(checkpoint, "student", into.state_dict(keep_vars=True))
    assert torch.equal(into.b.weight, model.a.weight)
    with pytest.raises(CrispError, match="other modules share"):
        load_into(checkpoint, "student", Tied(tied=False).state_dict(keep_vars=True))


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, step=1, x=torch.zeros(9))
    files = {path.suffix for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}


def test_a_mistake_in_the_values_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(
            tmp_path, {"student": {"x": torch.zeros(1)}}, {"x": torch.zeros(1)}, step=1, doomed=lambda steps: steps[:-1]
        )


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(CrispError, match=r"another architecture .*bias is \(5,\) there and \(3,\) here"):
        load_weights(nn.Linear(4, 3), nn.Linear(4, 5).state_dict(), source="there.pt")


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from crisp.checkpoint import save_checkpoint
for step in range(1, 100000):
    parts = {"student": {"x": torch.full((200_000,), float(step))}}
    save_checkpoint(Path(sys.argv[1]), parts, {"step": step}, step=step, doomed=lambda steps: steps[:-2])
    print(step, flush=True)
"""


def test_killed_at_any_moment_every_listed_checkpoint_is_whole(tmp_path: Path) -> None:
    for delay_s in (0.0, 0.003, 0.011, 0.017):
        folder = tmp_path / str(delay_s)
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, folder], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(4):
            last = int(process.stdout.readline())
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = list_checkpoints(folder)
        assert found
        for checkpoint in found:
            step = int(checkpoint.name.removeprefix("step-"))
            assert torch.equal(load_module_state(checkpoint, "student")["x"], torch.full((200_000,), float(step)))
        assert json.loads((found[-1] / "checkpoint.json").read_text())["step"] >= last
        save(folder, step=10**6, x=torch.zeros(1))
        assert len(list(folder.iterdir())) == 1, "what the killed save left is cleared by the next one"
