"""A contender of `crisp bench step` in a process of its own, which lives as long as steps are asked of it.

`StepWorker` starts this file in a fresh interpreter. The work order goes in as a line of JSON; then each line 'step' is
answered by a line with the seconds of one step, and 'peak' by the memory that steps took so far. Between two lines the
process sleeps: what several of them hold side by side is memory, not time.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import crisp
from crisp.errors import CrispError

log = logging.getLogger(__name__)

_ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """What one step took."""

    step_s: float
    """By the clock"""
    cpu_s: float
    """Of all threads of the process; unlike the clock's, it hardly suffers from what else the machine does"""


class StepWorker:
    """A contender that can be asked for steps. A context: leaving it ends the process.

    Args:
        name: of `step_contenders.CONTENDERS`.
        config: a `TrainConfig` as JSON types.
        device: torch's name of it.
        environment: of its process.

    Raises:
        CrispError: what the contender said, or that its process failed.
    """

    def __init__(self, name: str, config: Mapping[str, Any], *, device: str, environment: Mapping[str, str]) -> None:
        self._name = name
        places = [str(Path(crisp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        # What it prints beside its answers: a pipe that nobody reads would fill up.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "crisp.benchmarks.step_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        )
        try:
            self._ask(json.dumps({"contender": name, "config": config, "device": device}))
        except BaseException:
            self.close()
            raise

    def step(self) -> "StepTime":
        """Have it take a step."""
        return StepTime(**self._ask("step"))

    def peak_gb(self) -> float:
        """The most memory that its steps have taken so far: see `Memory`. In 10⁹ bytes."""
        return float(self._ask("peak")["peak_gb"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def __enter__(self) -> "StepWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None, "a pipe"
        assert self._process.stdout is not None, "a pipe"
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer.startswith("{"):
            raise CrispError(
                f"contender {self._name}: its process failed ({self._last_words()}); take a smaller --batch, or leave "
                f"it out with --contenders"
            )
        said: dict[str, Any] = json.loads(answer)
        if _ERROR in said:
            raise CrispError(said[_ERROR])
        return said

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its channel closes before it has told why
            self._process.wait(timeout=10)
        self._said.seek(0)
        return (self._said.read().strip().splitlines() or ["no message; was it killed for its memory?"])[-1]


# --- in the fresh process -------------------------------------------------------------------------------------------


class Memory:
    """What steps take, from now on, in 10⁹ bytes.

    On a GPU, the most that torch had allocated: networks, optimiser and batch are part of it. On the CPU, the most
    that the process had in RAM, less what it has now: gradients, activations and the optimiser's moments, but not the
    networks and the batch, since those cannot be told from the libraries.
    """

    def __init__(self, device: str) -> None:
        self._gpu = device != "cpu"
        self._before_gb = 0.0
        if self._gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        except OSError as error:
            log.warning("peak_gb: the peak from before the first step cannot be cleared (%s) and counts", error)
        self._before_gb = _resident_gb("VmRSS")

    def peak_gb(self) -> float:
        """See the class."""
        if self._gpu:
            import torch

            return torch.cuda.max_memory_allocated() / 1e9
        return _resident_gb("VmHWM") - self._before_gb


def _resident_gb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def serve(questions: TextIO, answers: TextIO) -> None:
    """Build the contender of the first line, then answer each line that follows."""

    def answer(values: Mapping[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    order = json.loads(questions.readline())
    import torch

    from crisp.benchmarks.loader_rate import settle
    from crisp.benchmarks.step_contenders import CONTENDERS, make_batch
    from crisp.config import train_config_from_json

    config, device = train_config_from_json(order["config"]), torch.device(order["device"])
    try:
        step = CONTENDERS[order["contender"]](config, make_batch(config, device))
    except CrispError as error:
        answer({_ERROR: str(error)})
        return
    settle(device)
    memory = Memory(device.type)
    answer({})
    for line in questions:
        if line.strip() == "step":
            start_s, cpu_start_s = time.perf_counter(), time.process_time()
            step()
            settle(device)
            answer({"step_s": time.perf_counter() - start_s, "cpu_s": time.process_time() - cpu_start_s})
        else:
            answer({"peak_gb": memory.peak_gb()})


if __name__ == "__main__":
    # Answers go where standard output went; what libraries print goes to standard error.
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)
        serve(sys.stdin, channel)
