"""What a measurement was taken on."""

import os
import platform
from pathlib import Path

from crisp import machine
from crisp.machine import cores, gpu_names, memory_gb, processor_name

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
    return f"{processor_name()}, {cores()} cores"


def vectors() -> str:
    """The widest vector instructions that the processor has, of those that matter here; '' on others than x86."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")


def gpus() -> str:
    """Names of the GPUs that torch sees; '' where it sees none."""
    return ", ".join(gpu_names())


def versions() -> str:
    """Of the libraries that decode, render and load, as far as they are installed."""
    return ", ".join(f"{name} {version}" for name, version in machine.versions(_PACKAGES).items())


def hardware() -> str:
    """One line: processor, memory, GPUs, load, system and versions."""
    parts = (
        processor(),
        vectors(),
        f"{memory_gb():.0f} GB",
        gpus() or "no GPU",
        f"load {os.getloadavg()[0]:.1f}",
        platform.system(),
        f"Python {platform.python_version()}",
        versions(),
    )
    return ", ".join(filter(None, parts))
