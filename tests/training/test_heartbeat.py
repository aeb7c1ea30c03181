"""A rank that is stopped, hangs or is killed: the other one ends within the timeout, and names it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crisp.distributed import World
from crisp.run_state import read_state
from crisp.training.heartbeat import EXIT_STATUS, Heartbeat, collective_timeout
from crisp.training.liveness import Phase
from tests.test_trainer import shards, wait_for_step

__all__ = ["shards"]  # a fixture

ROOT = Path(__file__).parents[2]
Ranks = list[subprocess.Popen[str]]


def start(shards: Path, run: Path, mode: str) -> Ranks:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("one_rank.py")), str(shards), str(run), mode],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    started: Ranks = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_by_the_other(shards: Path, tmp_path: Path, ranks: Ranks, victim: int) -> None:
    """Rank 0 holds the store, too, so that nothing answers while it is stopped."""
    ranks += start(shards, tmp_path / "run", "go")
    wait_for_step(tmp_path / "run", 3, ranks[0])
    os.kill(ranks[victim].pid, signal.SIGSTOP)
    _, err = ranks[1 - victim].communicate(timeout=90)
    assert ranks[1 - victim].returncode == EXIT_STATUS, err
    assert f"rank {victim} ({socket.gethostname()}, process {ranks[victim].pid})" in err.splitlines()[-1], err
    state = read_state(tmp_path / "run")
    assert state is not None
    assert state.state == "failed"
    assert f"rank {victim}" in state.reason


@pytest.mark.slow
def test_a_rank_whose_loader_hangs_is_named_by_both(shards: Path, tmp_path: Path, ranks: Ranks) -> None:
    ranks += start(shards, tmp_path / "run", "hang")
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert EXIT_STATUS in [process.returncode for process in ranks]
    assert all(process.returncode != 0 for process in ranks)
    named = f"rank 1 ({socket.gethostname()}, process {ranks[1].pid}): "
    why = "without progress in waiting for data of step 3; 1 rank(s) wait"
    assert any(named in err and why in err for err in errors)
    assert not any("rank 0 (" in line for err in errors for line in err.splitlines() if "without progress" in line)
    assert "in blocking" in errors[1], "its stack shows where it hangs"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_other(shards: Path, tmp_path: Path, ranks: Ranks, victim: int) -> None:
    ranks += start(shards, tmp_path / "run", "go")
    wait_for_step(tmp_path / "run", 3, ranks[0])
    ranks[victim].kill()
    _, err = ranks[1 - victim].communicate(timeout=90)
    assert ranks[1 - victim].returncode != 0
    state = read_state(tmp_path / "run")
    assert state is not None
    assert f"rank {victim}" in state.reason
    assert f"rank {victim} ({socket.gethostname()}, process {ranks[victim].pid})" in err.splitlines()[-1], err


def test_a_world_of_one_has_no_heartbeat() -> None:
    world = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))
    with Heartbeat(world, timeout_s=0.1) as heart:
        heart.mark(0, Phase.TRAINING)
        time.sleep(0.3)


def test_collectives_wait_longer_than_the_heartbeat() -> None:
    assert collective_timeout(0) is None
    for timeout_s in (1.0, 600.0):
        limit = collective_timeout(timeout_s)
        assert limit is not None
        assert limit.total_seconds() > 6 * timeout_s
