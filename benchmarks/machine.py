"""What a measurement was taken on."""

import importlib.metadata
import os
import platform
from pathlib import Path

# Distributions whose version decides how fast a loader is; DALI is one of two.
_PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "Pillow": "pillow",
    "simplejpeg": "simplejpeg",
    "Numba": "numba",
    "DALI": "nvidia-dali-cuda130",
    "DALI (CUDA 12)": "nvidia-dali-cuda120",
}


def processor() -> str:
    """Model of the processor and the cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"{model or platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def vectors() -> str:
    """The widest vector instructions that the processor has, of those that matter here; '' on others than x86."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")


def gpus() -> str:
    """Names of the GPUs that torch sees; '' where it sees none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ", ".join(torch.cuda.get_device_name(i) for i in range(count))


def versions() -> str:
    """Of the libraries that decode, render and load, as far as they are installed."""
    found = []
    for name, distribution in _PACKAGES.items():
        try:
            found.append(f"{name} {importlib.metadata.version(distribution)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def hardware() -> str:
    """One line: processor, memory, GPUs, load, system and versions."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parts = (
        processor(),
        vectors(),
        f"{memory_gb:.0f} GB",
        gpus() or "no GPU",
        f"load {os.getloadavg()[0]:.1f}",
        platform.system(),
        f"Python {platform.python_version()}",
        versions(),
    )
    return ", ".join(filter(None, parts))
