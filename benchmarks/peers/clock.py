"""How a loader's turn is timed, whoever's loader it is. Standard library alone: peers have environments of their
own.

A turn: open the loader, take the first batch, let the prefetch become steady, then count batches for some seconds. Time
and memory are of the process and of all that it started.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

Spec = Mapping[str, Any]
"""What a turn is to do, as JSON types: `LoaderBenchConfig.spec` has the keys."""

Views = tuple[Any, Sequence[Any], Sequence[Any]]
"""Reference [B, 3, R, R], the two global views [B, 3, G, G] each, the local views [B, 3, l, l] each."""

Opener = Callable[[], AbstractContextManager[Iterator[Views]]]


class Gpu(Protocol):
    """What the clock needs to know of a GPU."""

    def settle(self) -> None:
        """Wait until the GPU has done all that it was given."""

    def used_mb(self) -> float:
        """Memory of the GPU that is in use, by everybody."""


def time_batches(
    open_batches: Opener, spec: Spec, *, gpu: Gpu | None = None, has_views: bool = True
) -> dict[str, float]:
    """One turn of a loader; the keys are the fields of `loader_turn.Turn`.

    Args:
        open_batches: of the loader.
        spec: what is to be done.
        gpu: whose work counts too.
        has_views: the batches are `Views`, and are checked to be those asked for.

    Raises:
        ValueError: they are not.
    """
    batch, workers = spec["config"]["optim"]["global_batch"], spec["workers"]
    used_before_mb = gpu.used_mb() if gpu else 0.0
    began_s = time.perf_counter()
    with open_batches() as batches:
        first = next(batches)
        _settle(gpu)
        first_batch_s = time.perf_counter() - began_s
        if has_views:
            check_views(first, spec)
        del first
        for _ in range(spec["warm_up"]):
            next(batches)
        _settle(gpu)
        # The clock last, and first below: looking through /proc takes milliseconds.
        count, cpu_start_s, busy_start_s, start_s = 0, cpu_seconds(), busy_seconds(), time.perf_counter()
        # DataLoader workers make a batch each, and so deliver in volleys: whole volleys are counted.
        while not count or count % workers or time.perf_counter() - start_s < spec["seconds"]:
            next(batches)
            count += 1
        _settle(gpu)
        elapsed_s, cpu_s = time.perf_counter() - start_s, cpu_seconds() - cpu_start_s
        others_s = busy_seconds() - busy_start_s - cpu_s
        samples = count * batch
        return {
            "samples_per_s": samples / elapsed_s,
            "cpu_ms_per_sample": cpu_s / samples * 1e3,
            "cores_busy": cpu_s / elapsed_s,
            "cores_of_others": max(0.0, others_s / elapsed_s),
            "first_batch_s": first_batch_s,
            "peak_mb": peak_mb(),
            "processes": 1 + len(descendants()),
            "gpu_mb": gpu.used_mb() - used_before_mb if gpu else 0.0,
        }


def _settle(gpu: Gpu | None) -> None:
    if gpu is not None:
        gpu.settle()


def check_views(batch: Views, spec: Spec) -> None:
    """A loader that makes less than the others would win.

    Raises:
        ValueError: a view is missing, or has another shape or type than asked for.
    """
    views, size = spec["config"]["views"], spec["config"]["optim"]["global_batch"]
    reference, global_views, local_views = batch
    sides = [views["reference_px"], *[views["global_px"]] * 2, *[views["local_px"]] * views["local_views"]]
    wanted = [((size, 3, side, side), "torch.float32") for side in sides]
    made = [(tuple(images.shape), str(images.dtype)) for images in (reference, *global_views, *local_views)]
    if made != wanted:
        raise ValueError(f"backend {spec['backend']}: a batch of {made}, asked for {wanted}")


def descendants() -> list[int]:
    """Processes that this one has started, and theirs, that are alive."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _stat(process: int) -> list[str]:
    """Fields of /proc/N/stat from the state on; nothing if the process has ended."""
    try:
        # The fields after the command's name, which is in parentheses.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def cpu_seconds() -> float:
    """Processor time of this process, of its living descendants, and of those that one of them has waited for.

    So that of workers that have ended counts, also where they were forked from a process in between that lives on.
    """
    ticks = os.sysconf("SC_CLK_TCK")
    others = (fields for process in descendants() if (fields := _stat(process)))
    return sum(os.times()[:4]) + sum(sum(map(int, fields[11:15])) for fields in others) / ticks


def busy_seconds() -> float:
    """Processor time of everybody on this machine, and what its host took away."""
    user, nice, system, _, _, *interrupts_and_steal = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    )
    return (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")


def peak_mb() -> float:
    """The most memory that each of these processes has had in RAM, summed, in 10⁶ bytes.

    Pages that processes share (the parent's, after a fork; batches in shared memory) count in each of them.
    """
    total_kib = 0
    for process in (os.getpid(), *descendants()):
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            continue
        total_kib += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return total_kib * 1024 / 1e6


def run_script(prepare: Callable[[Spec], Opener]) -> None:
    """A peer's script: the spec on standard input, the turn as the last line of standard output."""
    spec = json.load(sys.stdin)
    print(json.dumps(time_batches(prepare(spec), spec)), flush=True)
