"""A check in a process of its own: it may raise, crash, hang or spoil the GPU's context, and the next one goes on.

Processes are forked from a server that has imported torch and has never touched a GPU.
"""

import contextlib
import faulthandler
import importlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from crisp.doctor.check import Answer, Finding, NotHere, Wrong
from crisp.doctor.config import Context
from crisp.errors import CrispError

PRELOAD = ["crisp.doctor.preload"]
"""Modules that the server imports, once"""

OUTPUT_LINES = 40
"""Of what a failed check printed, kept for the report"""

_GRACE_S = 20.0  # to end, after the answer or when asked to


def run_apart(target: str, context: Context, *, timeout_s: float) -> Answer:
    """What `target` (`module:function`) came to, however it ended."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOAD)
    with tempfile.NamedTemporaryFile("r", dir=context.folder, prefix="said-", errors="replace") as said:
        receiver, sender = forks.Pipe(duplex=False)
        process = forks.Process(target=_answer, args=(target, context, sender, said.name, timeout_s))
        try:
            process.start()
        except (EOFError, OSError) as error:
            text = f"no process could be started ({error!r}); does 'import torch' crash?"
            return Answer(status="fail", text=text)
        sender.close()
        try:
            answer = _await(process, receiver, timeout_s)
        finally:
            _end(process)
            receiver.close()
        if answer.status != "fail":
            return answer
        return _with_output(answer, said.read())


def _await(process: Any, receiver: Connection, timeout_s: float) -> Answer:
    multiprocessing.connection.wait([receiver, process.sentinel], timeout_s)
    answer: Answer | None = None
    with contextlib.suppress(EOFError, OSError):
        if receiver.poll():
            answer = receiver.recv()
    if answer is None:
        process.join(1.0)
        if process.exitcode is None:
            return Answer(status="fail", text=f"no answer within {timeout_s:g} s; its process was ended")
        return Answer(status="fail", text=f"its process died: {_cause(process.exitcode)}")
    process.join(_GRACE_S)
    if process.exitcode == 0 or answer.status == "fail":
        return answer
    how = "did not end" if process.exitcode is None else f"died: {_cause(process.exitcode)}"
    return Answer(status="fail", text=f"{answer.text}, but then its process {how}")


def _cause(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exit status {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"{name}; was there too little memory?" if -exitcode == signal.SIGKILL else name


def _end(process: Any) -> None:
    """The process, and those that it has started: asked first, since torchrun ends its ranks when it is asked."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        until_s = time.monotonic() + _GRACE_S
        while time.monotonic() < until_s:
            os.killpg(process.pid, 0)  # raises when the group is gone
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have got so far as to lead a group
    process.join()


def _with_output(answer: Answer, output: str) -> Answer:
    last = "\n".join(output.strip().splitlines()[-OUTPUT_LINES:])
    return Answer(
        status=answer.status, text=answer.text, missing=answer.missing, traceback=answer.traceback, output=last
    )


# --- in the process of the check ------------------------------------------------------------------------------------


def _answer(target: str, context: Context, sender: Connection, said: str, timeout_s: float) -> None:
    os.setsid()  # a group of its own, which `_end` ends
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(file=2)  # says where it crashed, or hangs
    faulthandler.dump_traceback_later(max(1.0, 0.95 * timeout_s), file=2)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    try:
        answer = _call(_resolve(target), context)
    except ImportError as error:
        answer = _failed(error, missing=error.name)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is what the line says)
        answer = _failed(error)
    faulthandler.cancel_dump_traceback_later()
    sender.send(answer)
    sender.close()


def _resolve(target: str) -> Callable[[Context], Finding]:
    module, _, name = target.partition(":")
    function: Callable[[Context], Finding] = getattr(importlib.import_module(module), name)
    return function


def _call(function: Callable[[Context], Finding], context: Context) -> Answer:
    try:
        found = function(context)
    except NotHere as reason:
        return Answer(status="skipped", text=str(reason))
    return Answer(status="pass", text=found.figure, values=found.values)


def _failed(error: Exception, *, missing: str | None = None) -> Answer:
    words = (str(error).strip().splitlines() or [""])[0]
    known = isinstance(error, Wrong | CrispError)
    text = words if known else f"{type(error).__name__}: {words}".rstrip(": ")
    return Answer(status="fail", text=text, missing=missing, traceback=traceback.format_exc())


def work_folder(parent: Path, name: str) -> Path:
    """A fresh folder for a check under the scratch folder."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
