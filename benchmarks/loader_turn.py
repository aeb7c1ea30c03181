"""One turn of one backend in a process of its own: its memory, its threads and its imports are its own too.

`take_turn` starts this file, or a peer's script, in a fresh interpreter: the work order goes in as JSON, and what was
measured comes out as the last line.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crisp
from crisp.benchmarks.loader_backends import BACKENDS, PEERS, prepare
from crisp.benchmarks.loader_ceiling import Part
from crisp.benchmarks.peers.clock import Spec, time_batches
from crisp.errors import CrispError
from crisp.process_settings import SETTINGS

PARTS = "parts"
"""Instead of a backend: the parts of the CPU renderer, each alone"""

QUIET_CORES = 0.15
"""If others keep more than this busy, figures are not to be trusted"""

_ERROR = "error"
_PATIENCE_S = 600.0  # beyond a turn's length


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One turn of one backend."""

    samples_per_s: float
    cpu_ms_per_sample: float
    """Of its process and all below; unlike the rate, it hardly suffers from what else the machine does"""
    cores_busy: float
    cores_of_others: float
    """Kept busy by others meanwhile"""
    first_batch_s: float | None
    """From before the loader is built, with imports done, to the first batch in hand; None: no batches"""
    peak_mb: float
    """Sum of the peaks of all its processes, in 10⁶ bytes"""
    processes: int
    gpu_mb: float
    """Memory of the GPU that it took"""


def take_turn(spec: Spec, *, peers_python: Path | None = None) -> Turn:
    """Have a fresh process take a turn.

    Raises:
        CrispError: what the loader said, or that it failed, hung or made other batches than asked for.
    """
    return Turn(**_in_fresh_process(spec, peers_python))


def take_parts_turn(spec: Spec) -> dict[str, Part]:
    """Have a fresh process measure the parts of the CPU renderer; see `time_parts`.

    Raises:
        CrispError: as `take_turn`.
    """
    return {name: Part(**values) for name, values in _in_fresh_process(spec, None).items()}


def _in_fresh_process(spec: Spec, peers_python: Path | None) -> dict[str, Any]:
    name = spec["backend"]
    script = BACKENDS[name].script if name in BACKENDS else ""
    # The crisp command's settings of threads, for everybody.
    environment = {**SETTINGS, "PYTHONWARNINGS": "ignore", **os.environ}
    if script:
        command = [str(peers_python or sys.executable), str(PEERS / script)]
    else:
        command = [sys.executable, "-m", "crisp.benchmarks.loader_turn"]
        places = [str(Path(crisp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # a group, so that its workers end with it
    )
    try:
        output, errors = process.communicate(json.dumps(spec), timeout=spec["seconds"] + _PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise CrispError(
            f"backend {name}: no answer after {_PATIENCE_S:.0f} s; leave it out with --backends"
        ) from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = _last_line(output)
    if process.returncode or not said.startswith("{"):
        raise CrispError(f"backend {name}: its turn failed ({_last_line(errors)}); leave it out with --backends")
    measured: dict[str, Any] = json.loads(said)
    if _ERROR in measured:
        raise CrispError(measured[_ERROR])
    return measured


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


# --- in the fresh process -------------------------------------------------------------------------------------------


class TorchGpu:
    """See `clock.Gpu`."""

    def settle(self) -> None:
        """Wait for the GPU."""
        import torch

        torch.cuda.synchronize()

    def used_mb(self) -> float:
        """In 10⁶ bytes, of whatever library: DALI's is not torch's."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e6


def measure(spec: Spec) -> Mapping[str, Any]:
    """The turn, in this process.

    Raises:
        CrispError: the loader's own.
    """
    name = spec["backend"]
    if name == PARTS:
        from crisp.benchmarks.loader_parts import time_parts

        return time_parts(spec)
    gpu = TorchGpu() if spec["device"] == "gpu" else None
    if name == "decode-only" and gpu is None:
        from crisp.benchmarks.loader_parts import time_decoding

        return time_decoding(spec)
    return time_batches(prepare(spec), spec, gpu=gpu, has_views=name != "decode-only")


def main() -> None:
    """What the fresh process runs."""
    spec = json.load(sys.stdin)
    try:
        measured = measure(spec)
    except CrispError as error:
        measured = {_ERROR: str(error)}
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
