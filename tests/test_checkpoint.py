"""Checkpoints are whole or absent, and say what is wrong with them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from crisp.checkpoint import list_checkpoints, load_checkpoint, load_weights, save_checkpoint
from crisp.errors import CrispError


def but_1(steps: list[int]) -> list[int]:
    return steps[:-1]


def but_2(steps: list[int]) -> list[int]:
    return steps[:-2]


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_checkpoint(
            tmp_path, {"step": step, "x": torch.full((3,), float(step))}, step=step, doomed=lambda steps: steps[:-2]
        )
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]
    state = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert state["step"] == 10
    assert torch.equal(state["x"], torch.full((3,), 10.0))


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"v": 1}, step=5, doomed=but_1)
    final = save_checkpoint(tmp_path, {"v": 2}, step=5, doomed=but_1)
    assert load_checkpoint(final)["v"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: os.truncate(p / "state.pt", 100), "truncated"),
        (lambda p: (p / "state.pt").unlink(), "missing"),
        (lambda p: (p / "checkpoint.json").write_text("{"), "unreadable"),
        (lambda p: _flip_a_byte(p / "state.pt"), "SHA-256"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path: Path, damage, words: str) -> None:
    checkpoint = save_checkpoint(tmp_path, {"x": torch.zeros(1000)}, step=1, doomed=but_1)
    damage(checkpoint)
    with pytest.raises(CrispError, match=words) as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    assert "delete" in str(caught.value)


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
    save_checkpoint(Path(sys.argv[1]), {"step": step, "x": torch.full((200_000,), float(step))}, step=step,
        doomed=lambda steps: steps[:-2])
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
            state = load_checkpoint(checkpoint)
            assert torch.equal(state["x"], torch.full((200_000,), float(state["step"])))
        assert json.loads((found[-1] / "checkpoint.json").read_text())["step"] >= last
        save_checkpoint(folder, {"step": 10**6}, step=10**6, doomed=but_1)
        assert len(list(folder.iterdir())) == 1, "what the killed save left is cleared by the next one"
