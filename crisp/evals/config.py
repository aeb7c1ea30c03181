"""The choices that every `crisp eval` command has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crisp.errors import CrispError

Device = Literal["auto", "cuda", "cpu"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Which model, which data, where results go.

    An evaluation's own config derives from this one; if it has a `__post_init__`, it calls
    `EvalConfig.__post_init__(self)` first (`super()` does not work in a class with slots that a decorator makes).
    """

    weights: str
    """Folder of a run or of one of its checkpoints; timm:NAME; timm:NAME@FILE; FILE, recognised by its keys; or
    SYSTEM:FILE with the official weights of another system (docs/evaluate.md lists them)."""
    data: Path
    """Folder of the data set, as its official archives unpack (docs/evaluate.md has the layouts)."""
    out: Path = Path("runs/evals")
    """Folder of the results; each is OUT/TASK-DATASET.json and .md."""
    cache: Path = Path("runs/evals/cache")
    """Folder of extracted features, which evaluations share and go on with; shared by all nodes."""
    batch: int = 64
    """Images per forward pass on each device."""
    device: Device = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 4
    """Threads that read and decode images, on each rank."""
    precision: Precision = "float32"
    """Of the forward pass; below float32, matrix products are done in it (autocast)."""

    def __post_init__(self) -> None:
        for name in ("batch", "threads"):
            if getattr(self, name) < 1:
                raise CrispError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.weights:
            raise CrispError("weights='': give a run's folder, a file, or timm:NAME")
