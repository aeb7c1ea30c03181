"""What the machine is and what is installed on it, as rows of a table. Nothing here passes or fails."""

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
from pathlib import Path

import crisp
from crisp.benchmarks.machine import processor, vectors
from crisp.doctor.check import Finding
from crisp.doctor.config import Context
from crisp.doctor.limits import cpu_limit, memory_bytes
from crisp.doctor.privacy import shown_environment

DISTRIBUTION = "crisp-ssl"

PACKAGES = (
    "torch", "torchvision", "timm", "triton", "numpy", "numba", "llvmlite", "simplejpeg", "pillow", "webdataset",
    "safetensors", "fsspec", "tensorboard", "nvidia-dali-cuda130", "nvidia-dali-cuda120",
)  # fmt: skip
"""Whose versions a report names"""


def machine_facts(folder: Path) -> dict[str, str]:
    """Everything that can be said without torch. `folder`: where runs would be written."""
    memory = memory_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    facts = {
        "crisp": crisp.__version__,
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "processor": ", ".join(filter(None, (processor(), vectors()))),
        "processor limit": "none" if (limit := cpu_limit()) is None else f"{limit:g} cores",
        "load": f"{os.getloadavg()[0]:.1f}",
        "memory": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free",
        "shared memory": _room(Path("/dev/shm")),
        "disk here": _room(folder),
        "open files": f"{soft} (may be raised to {hard})",
        "GPU driver": gpu_driver() or "none found",
    }
    facts |= {f"${name}": value for name, value in shown_environment().items()}
    return facts


def installed() -> dict[str, str]:
    """Versions of `PACKAGES`."""
    return {name: _version(name) or "not installed" for name in PACKAGES}


def extras() -> dict[str, str]:
    """For each extra that users may want: complete, or what is missing and how to get it."""
    from packaging.requirements import Requirement

    wanted: dict[str, list[str]] = {}
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is None:
            continue
        for extra in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
            if requirement.marker.evaluate({"extra": extra}) and not requirement.marker.evaluate({"extra": ""}):
                wanted.setdefault(extra, []).append(requirement.name)
    said = {}
    for extra, names in sorted(wanted.items()):
        if extra == "dev":
            continue
        missing = [name for name in names if _version(name) is None]
        said[extra] = f"without {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]'" if missing else "complete"
    return said


def torch_facts(context: Context) -> Finding:
    """What torch was built with and sees, as lines 'name: value'; values: how many GPUs."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines = {
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
        f"vectors {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "cuDNN": str(torch.backends.cudnn.version() or "none"),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "none",
        "gloo": "yes" if dist.is_gloo_available() else "none",
    }
    for i in range(gpus):
        about = torch.cuda.get_device_properties(i)
        lines[f"GPU {i}"] = (
            f"{about.name}, {about.total_memory / 1e9:.1f} GB, capability {about.major}.{about.minor}, "
            f"{about.multi_processor_count} multiprocessors"
        )
    if not gpus:
        lines["GPU"] = "none that torch sees"
    return Finding(figure="\n".join(f"{name}: {value}" for name, value in lines.items()), values={"gpus": gpus})


def gpu_driver() -> str:
    """Driver and GPUs as nvidia-smi has them, which needs no torch; '' where there are none."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            return "; ".join(line.strip() for line in done.stdout.strip().splitlines())
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0].strip() if version.is_file() else ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _room(folder: Path) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return f"unknown ({error.strerror})"
    return f"{usage.total / 1e9:.1f} GB, {usage.free / 1e9:.1f} GB free"
