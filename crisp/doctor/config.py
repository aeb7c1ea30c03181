"""What the doctor is asked, and what a check is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from crisp.errors import CrispError

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Examine this machine: what it has, and whether every fast path gives what its plain twin gives."""

    out: Path = Path("crisp-doctor.md")
    """Report in Markdown, to attach to a bug; the same as JSON is written beside it. An older report is replaced."""
    quick: bool = False
    """Only the checks that take seconds: no two ranks, no timing, no run to its end."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto examines the GPU where there is one; cuda fails where there is none; cpu leaves it out."""

    def __post_init__(self) -> None:
        if self.out.suffix == ".json":
            raise CrispError(f"out={self.out}: the report is Markdown, its JSON is written beside it; name a .md file")


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What a check is told."""

    folder: Path
    """Scratch folder, shared by all checks of this examination"""
    report_folder: Path
    """Where the report goes, as runs would"""
    device: Device
    """What the twins run on"""
    asked_device: Literal["auto", "cpu", "cuda"]
    """As on the command line"""
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What earlier checks found, by their name"""
