"""Checks on a machine where something is broken, each run in the process that the doctor makes for it."""

import ctypes
import errno
import os
import sys
import time

import torch

from crisp.doctor import data_checks, machine_checks, rank_checks, training_checks, twins
from crisp.doctor.check import Finding
from crisp.doctor.config import Context
from crisp.pipelines.cpu import CpuRenderer


def fine(context: Context) -> Finding:
    return Finding(figure="fine, to 1 µm", values={"loss": 2.5})


def uses_the_value_of_fine(context: Context) -> Finding:
    return Finding(figure=f"found {context.values['fine']['loss']}")


def wrong_cross_entropy(context: Context) -> Finding:
    right = twins.prototype_cross_entropy

    def wrong(*args: object, **options: float) -> torch.Tensor:
        return right(*args, **{**options, "teacher_temperature": 0.06})  # type: ignore[arg-type]

    twins.prototype_cross_entropy = wrong  # type: ignore[assignment]
    return twins.cross_entropy(context)


def wrong_renderer(context: Context) -> Finding:
    render = CpuRenderer.render

    def brighter(self: CpuRenderer, work: object) -> object:
        batch = render(self, work)  # type: ignore[arg-type]
        batch.local_views.add_(0.01)  # .6 levels
        return batch

    CpuRenderer.render = brighter  # type: ignore[assignment, method-assign]
    return data_checks.cpu_renderer(context)


def a_package_is_missing(context: Context) -> Finding:
    sys.modules["simplejpeg"] = None  # type: ignore[assignment]
    return machine_checks.packages(context)


def imports_what_is_missing(context: Context) -> Finding:
    import crisp_has_no_such_dependency  # type: ignore[import-not-found]  # noqa: F401

    return fine(context)


def _full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def disk_is_full(context: Context) -> Finding:
    os.fsync = _full  # type: ignore[assignment]
    return machine_checks.disk(context)


def disk_is_full_at_a_checkpoint(context: Context) -> Finding:
    data_checks.shards(context)
    os.fsync = _full  # type: ignore[assignment]
    return training_checks.checkpoint(context)


def a_rank_fails(context: Context) -> Finding:
    data_checks.shards(context)
    code = "import os, sys; print('rank', os.environ['RANK'], 'was here'); sys.exit(int(os.environ['RANK']) * 7)"
    launch = rank_checks.torchrun

    def failing(run: object) -> list[str]:
        command = launch(run)  # type: ignore[arg-type]
        program = context.folder / "rank.py"
        program.write_text(code)
        return [*command[: command.index("2") + 1], str(program)]

    rank_checks.torchrun = failing  # type: ignore[assignment]
    return rank_checks.gloo(context)


def crashes(context: Context) -> Finding:
    print("about to crash")
    sys.stdout.flush()
    ctypes.string_at(0)
    return fine(context)


def exits(context: Context) -> Finding:
    os._exit(3)


def hangs(context: Context) -> Finding:
    time.sleep(600)
    return fine(context)


def dies_after_its_answer(context: Context) -> Finding:
    import multiprocessing.util

    multiprocessing.util.Finalize(None, os._exit, args=(4,), exitpriority=1)
    return fine(context)


def tells_secrets(context: Context) -> Finding:
    raise ValueError(f"cannot read {context.report_folder}/x with token hunter2hunter2 of /home/ada/x\nmore")
