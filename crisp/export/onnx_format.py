"""A graph for ONNX runtimes: images in, CLS token and patch tokens out, each through its own norm.

The batch is free. The size is not: position embeddings are resized by arithmetic on the grid's sides, which the graph
holds as constants, so that the tokens are those of training to rounding.
Axes: B images, n patches, D width.
"""

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from crisp.errors import CrispError
from crisp.models.trained import Trained
from crisp.models.vit import VisionTransformer

ONNX_FILE = "model.onnx"
MAX_INLINE_BYTES = 2**31 - 2**24
"""A protobuf must stay below 2³¹ bytes, the graph itself included; beyond, weights get a file of their own"""


class _BothTokens(nn.Module):
    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] → [B, D], [B, n, D]."""
        tokens = self.backbone(images)
        return tokens.cls, tokens.patches


def write_onnx(trained: Trained, folder: Path) -> None:
    """Write model.onnx: `images` [B, 3, H, W] float32 → `cls` [B, D], `patches` [B, n, D]; H = W, that of training.

    Args:
        trained: what to export.
        folder: an empty one. Weights of 2 GB and more go into model.onnx.data beside the graph.
    """
    backbone, image_px = trained.network.backbone, trained.config.views.global_px
    weights_bytes = sum(p.numel() * p.element_size() for p in backbone.parameters())
    program = torch.export.export(
        _BothTokens(backbone).eval(),
        (torch.zeros(2, 3, image_px, image_px),),  # a batch of 1 would be taken for a constant
        # asked for here, where a batch that is no free one is an error: the ONNX exporter would fix it and go on
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # where the exporter reports its progress
        torch.onnx.export(
            program,
            (),
            folder / ONNX_FILE,
            input_names=["images"],
            output_names=["cls", "patches"],
            dynamo=True,
            external_data=weights_bytes > MAX_INLINE_BYTES,
            verbose=False,
        )


def check_packages() -> None:
    """That torch's exporter finds what it needs.

    Raises:
        CrispError: the extra is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CrispError(f"format=onnx: {error}; pip install 'crisp-ssl[export]'") from error
