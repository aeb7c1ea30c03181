"""The choices of `crisp export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from crisp.errors import CrispError

Format = Literal["timm", "hf", "onnx"]
Norm = Literal["cls", "patch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write a trained backbone as a folder that timm, transformers or an ONNX runtime loads."""

    source: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run, for its newest whole checkpoint; or of one checkpoint, RUN/checkpoints/step-N."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to write; it must not exist yet."""
    format: Format = "timm"
    """timm: safetensors for timm.create_model; hf: transformers' ViTModel; onnx: a graph with both norms, of any batch
    and this image size (needs crisp-ssl[export])."""
    network: Literal["teacher", "student"] = "teacher"
    """Of the run's two. The teacher is the better one."""
    norm: Norm | None = None
    """Which of our two final norms becomes the one of timm and hf: cls, where the image's feature is wanted (the
    default); patch for dense features. The other one is written beside it. ONNX has both."""

    def __post_init__(self) -> None:
        if self.format == "onnx" and self.norm is not None:
            raise CrispError(f"norm={self.norm}: an ONNX file holds both norms; leave --norm out")
