"""What a process runs on: names and versions, never of hosts or users. A run keeps those of each of its starts."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from crisp import __version__

MACHINE_FILE = "machine.json"

# Distributions whose version decides what a run computes, or how fast; DALI is one of two.
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "NumPy": "numpy",
    "Triton": "triton",
    "Numba": "numba",
    "Pillow": "pillow",
    "simplejpeg": "simplejpeg",
    "DALI": "nvidia-dali-cuda130",
    "DALI (CUDA 12)": "nvidia-dali-cuda120",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One beginning or continuation of a run, as its main rank saw it."""

    step: int
    """Steps that were done before"""
    began_utc: str
    """2026-01-31 12:00:00"""
    ranks: int
    nodes: int
    device: str
    """That it trains on: cpu or cuda"""
    processor: str
    cores: int
    """That the process may use"""
    memory_gb: float
    gpus: tuple[str, ...]
    system: str
    versions: dict[str, str]


def note_start(run: Path, *, step: int, ranks: int, nodes: int, device: str) -> None:
    """Add a start to RUN/machine.json; for the main rank."""
    start = Start(
        step=step,
        began_utc=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        ranks=ranks,
        nodes=nodes,
        device=device,
        processor=processor_name(),
        cores=cores(),
        memory_gb=round(memory_gb(), 1),
        gpus=tuple(gpu_names()),
        system=platform.system(),
        versions={"crisp": __version__, "Python": platform.python_version(), **versions(PACKAGES)},
    )
    starts = [asdict(one) for one in (*read_starts(run), start)]
    partial = run / f".{MACHINE_FILE}.partial"
    partial.write_text(json.dumps(starts, indent=1) + "\n")
    partial.replace(run / MACHINE_FILE)


def read_starts(run: Path) -> list[Start]:
    """The starts of a run, oldest first; none where none are recorded, or the file cannot be read."""
    try:
        lines = json.loads((run / MACHINE_FILE).read_text())
        return [Start(**{**line, "gpus": tuple(line["gpus"])}) for line in lines]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def processor_name() -> str:
    """Model of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return model or platform.machine()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def memory_gb() -> float:
    """Of the machine, in 10⁹ bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def gpu_names() -> list[str]:
    """Those that torch sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(i) for i in range(count)]


def versions(packages: Mapping[str, str]) -> dict[str, str]:
    """Of distributions by their shown names, as far as they are installed."""
    found = {}
    for name, distribution in packages.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
