"""Runs of several ranks for the tests: processes on one machine, forked from one that has imported everything."""

import faulthandler
import json
import logging
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import crisp.checkpoint
import crisp.trainer
from crisp.batch import Batch
from crisp.config import TrainConfig
from crisp.trainer import train

# Forked, since importing torch and timm takes seconds, and there are many ranks.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.ranks"])
TIMEOUT_S = 240


class StoppedError(Exception):
    """The run was cut here, as a test wanted."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How it went on one rank."""

    error: str | None
    """The exception that ended it, as Type: message"""
    samples: dict[int, list[int]]
    """Sample ids by step (from 0), of the steps that this rank took"""
    log: str


def in_ranks(work: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """What `work(*args)` returned (JSON) in each of some ranks, with the environment that torchrun would give them."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_FORKS.Process(target=_rank, args=(r, ranks, port, folder, work, args)) for r in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
    hung = [(folder / f"hanging-{r}").read_text() for r, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
    assert not hung, "\n".join(hung)
    assert all(process.exitcode == 0 for process in processes), "\n".join(
        path.read_text() for path in folder.glob("error-*")
    )
    return [json.loads((folder / f"result-{r}.json").read_text()) for r in range(ranks)]


def _rank(rank: int, ranks: int, port: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    hanging = (folder / f"hanging-{rank}").open("w")  # stays open until the process ends
    faulthandler.dump_traceback_later(TIMEOUT_S - 10, file=hanging)
    try:
        result = work(*args)
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
    (folder / f"result-{rank}.json").write_text(json.dumps(result))


def run(
    config: TrainConfig, ranks: int, *, resume: bool = False, stop_after: int | None = None, fault: str | None = None
) -> list[Outcome]:
    """Train in so many ranks; cut after so many steps; with one of `FAULTS` in the last rank alone."""
    folder = config.run_folder.with_name(f"{config.run_folder.name}-outcomes")
    results = in_ranks(_train, ranks, folder, config, resume, stop_after, fault)
    return [Outcome(**{**r, "samples": {int(step): ids for step, ids in r["samples"].items()}}) for r in results]


def _train(config: TrainConfig, resume: bool, stop_after: int | None, fault: str | None) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    samples: dict[int, list[int]] = {}
    step = crisp.trainer.train_step
    restore = crisp.trainer.restore
    first = [0]

    def noted_restore(*args: Any) -> int:
        first[0] = restore(*args)
        return first[0]

    def noted_step(state: Any, batch: Batch, schedule: Any) -> object:
        if len(samples) == stop_after:
            raise StoppedError
        samples[first[0] + len(samples)] = batch.sample_id.tolist()
        return step(state, batch, schedule)

    crisp.trainer.train_step = noted_step  # type: ignore[assignment]
    crisp.trainer.restore = noted_restore
    if fault is not None and rank == int(os.environ["WORLD_SIZE"]) - 1:
        FAULTS[fault]()
    log = config.run_folder.with_name(f"{config.run_folder.name}-outcomes") / f"log-{rank}"
    handler = logging.FileHandler(log, mode="w")
    logging.getLogger("crisp").addHandler(handler)
    logging.getLogger("crisp").setLevel("INFO")
    error = None
    try:
        train(config, resume=resume)
    except Exception as raised:  # noqa: BLE001
        error = f"{type(raised).__name__}: {raised}"
    return {"error": error, "samples": samples, "log": log.read_text()}


def _full_at_step_4_when_it_flushes() -> None:
    flush = crisp.checkpoint._flush

    def full(path: Path) -> None:
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        flush(path)

    crisp.checkpoint._flush = full


def _full_from_step_4_when_torch_writes() -> None:
    class Full(crisp.checkpoint.HuggingFaceStorageWriter):  # type: ignore[misc]
        def write_data(self, *args: Any) -> Any:
            if "step-00000002" not in str(self.path):
                raise OSError(28, "No space left on device")
            return super().write_data(*args)

    crisp.checkpoint.HuggingFaceStorageWriter = Full  # type: ignore[misc]


def _sees_no_checkpoint() -> None:
    crisp.checkpoint.list_checkpoints = lambda folder: []


FAULTS = {
    "full at step 4": _full_at_step_4_when_it_flushes,
    "full from step 4": _full_from_step_4_when_torch_writes,
    "sees no checkpoint": _sees_no_checkpoint,
}
