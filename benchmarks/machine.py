"""What a measurement was taken on."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """Model of the processor and the cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"{model or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
