"""What a container may use of its machine: memory and processor time, by its control group."""

import os
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBytes:
    """Of the machine or, where that is less, of the container."""

    total: int
    available: int


def memory_bytes(*, meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> MemoryBytes:
    """Memory in all, and what new processes may take."""
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines()}
    total, available = values["MemTotal"], values["MemAvailable"]
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and limit < total:
        # What a container has read of files counts as used, and is given back when memory is wanted.
        cache = _stat(cgroup / "memory.stat", "inactive_file")
        total, available = limit, min(available, limit - (used or 0) + cache)
    return MemoryBytes(total=total, available=max(0, available))


def cpu_limit(*, cgroup: Path = CGROUP) -> float | None:
    """Cores' worth of time that the container may use; None: no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def usable_cores() -> int:
    """Cores that this process may run on; what a renderer takes its number of threads from."""
    return len(os.sched_getaffinity(0))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # absent, or 'max'
        return None


def _stat(file: Path, name: str) -> int:
    try:
        return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == name)
    except (OSError, StopIteration):
        return 0
