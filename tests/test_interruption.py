"""A run that is told to stop saves, leaves, and ends like an undisturbed one when it is resumed."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import crisp.trainer
from crisp.checkpoint import list_checkpoints
from crisp.distributed import World
from crisp.interruption import SIGNALS, interruption
from crisp.runs import CHECKPOINTS
from crisp.trainer import train
from tests.test_trainer import as_arguments, assert_identical, final_state, shards, tiny, wait_for_step

__all__ = ["shards"]  # a fixture


def one_rank() -> World:
    return World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_heard_while_it_is_open_and_the_handler_before_it_is_back_after(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruption(one_rank()) as stopping:
        assert not stopping.stop_now()
        os.kill(os.getpid(), number)
        assert stopping.stop_now()
    assert signal.getsignal(number) is before


def test_told_to_stop_it_saves_and_resumed_it_ends_the_same(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(tiny(shards, tmp_path / "whole"))
    config = replace(tiny(shards, tmp_path / "cut"), checkpoint_every=100)
    step, calls = crisp.trainer.train_step, []

    def told_at_the_fifth(*args: object) -> object:
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(crisp.trainer, "train_step", told_at_the_fifth)
    with caplog.at_level("INFO"):
        run = train(config)
    assert [path.name for path in list_checkpoints(run / CHECKPOINTS)] == ["step-00000005"]
    assert "stopped after step 5; continue with 'crisp train --resume" in caplog.text
    train(replace(config, checkpoint_every=2), resume=True)
    assert_identical(final_state(run), final_state(whole))


@pytest.mark.slow
def test_one_of_two_ranks_is_told_and_both_leave_after_the_same_step(shards: Path, tmp_path: Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "crisp",
        "train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*launch, *arguments], text=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def finish(process: subprocess.Popen[str]) -> str:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return err

    finish(start("demo", *as_arguments(tiny(shards, tmp_path / "whole"))))
    cut = tmp_path / "cut"
    process = start("demo", *as_arguments(replace(tiny(shards, cut), checkpoint_every=100)))
    wait_for_step(cut, 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    err = finish(process)
    (saved,) = list_checkpoints(cut / CHECKPOINTS)
    assert err.count("; continue with 'crisp train --resume") == 2
    assert int(saved.name.removeprefix("step-")) < 9, "it was over before the signal came"
    finish(start("--resume", str(cut)))
    assert_identical(final_state(cut), final_state(tmp_path / "whole"))
