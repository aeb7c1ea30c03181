"""What libraries read once, when a process starts: how threads wait, what oneDNN keeps, who hands out memory.

Measured in `benchmarks/results/step.md` and `benchmarks/results/threads.md`. Whatever the environment sets already is
left as it is.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

SETTINGS: Mapping[str, str] = {
    # Renderer threads and torch's share the cores: torch's must not spin for long while they wait for each other. A
    # step on the CPU is several times as fast for it where the cores are busy, and a short spin is as fast as a long
    # one where they are not.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "1000",
    # Stochastic depth makes matrices of many sizes; oneDNN would keep compiled code for 1024 of them.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}

ALLOCATORS = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
"""Shared libraries to look for, the first one first: gperftools' tcmalloc without and with its profilers"""
PRELOAD = "LD_PRELOAD"
_GPU_DRIVER = Path("/dev/nvidiactl")


def find_allocator() -> str | None:
    """Path of an allocator for training steps on a CPU; None where there is none, or where there is a GPU.

    A step makes and drops gigabytes of tensors of many sizes. glibc's heap gets holes from it, and gives pages back
    and asks for them again; tcmalloc does neither. On a GPU torch has an allocator of its own.
    """
    ldconfig = shutil.which("ldconfig", path=os.pathsep.join([os.environ.get("PATH", ""), "/sbin", "/usr/sbin"]))
    if _GPU_DRIVER.exists() or ldconfig is None:
        return None
    known = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False).stdout
    for name in ALLOCATORS:
        if found := re.search(rf"^\s*{re.escape(name)} .*=> (\S+)$", known, re.MULTILINE):
            return found[1]
    return None


def environment_for_steps() -> dict[str, str]:
    """The environment for a process that takes training steps."""
    environment = {**SETTINGS, **os.environ}
    if PRELOAD not in environment and (allocator := find_allocator()):
        environment[PRELOAD] = allocator
    return environment


def environment_without_settings() -> dict[str, str]:
    """The environment as it was before crisp, if this is a process of it."""
    return {name: value for name, value in os.environ.items() if SETTINGS.get(name) != value}


def start_again_with_allocator() -> None:
    """Replace this process by one that has the allocator from its start; return where there is none to be had.

    The process keeps its number, its files and its arguments: who started it does not notice.
    """
    environment = environment_for_steps()
    if PRELOAD not in os.environ and PRELOAD in environment:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def log_allocator() -> None:
    """Say which allocator this process has, and what would be faster."""
    preloaded = os.environ.get(PRELOAD, "")
    if any(name in preloaded for name in ALLOCATORS):
        log.info("memory comes from %s", preloaded)
    else:
        log.info(
            "memory comes from the C library: steps on a CPU are faster and smaller with tcmalloc (Debian, Ubuntu: "
            "apt install libtcmalloc-minimal4)"
        )
