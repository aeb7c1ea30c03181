"""The backbone as a plain ViT with one final norm, and the norm that is left over.

Axes: D width, n patches.
"""

from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from crisp.export.config import Norm
from crisp.models.vit import VisionTransformer

WEIGHTS_FILE = "model.safetensors"
OTHER_NORM_FILE = "other_norm/norm.safetensors"
"""In a folder of its own: timm up to 1.0.28 fails where two such files lie side by side"""


def plain_weights(backbone: VisionTransformer, norm: Norm) -> dict[str, Tensor]:
    """Weights under timm's names: `norm.*` is the chosen final norm.

    The mask token is left out: it stands for patches that are hidden in training, and a plain ViT has none.

    Args:
        backbone: the trained one, with or without a norm of its own for each kind of token.
        norm: the one to take.
    """
    weights = {
        name: tensor
        for name, tensor in backbone.state_dict().items()
        if name != "mask_token" and not name.startswith(("norm_cls.", "norm_patch."))
    }
    return weights | {f"norm.{leaf}": tensor for leaf, tensor in _final_norm(backbone, norm).state_dict().items()}


def write_other_norm(backbone: VisionTransformer, norm: Norm, folder: Path) -> dict[str, str] | None:
    """Write the norm that is not chosen, `weight` and `bias` [D]; returns the line that says what it is.

    Returns:
        None, and nothing is written, where one norm serves both kinds of tokens.
    """
    if backbone.norm_cls is backbone.norm_patch:
        return None
    other: Norm = "patch" if norm == "cls" else "cls"
    layer = _final_norm(backbone, other)
    path = folder / OTHER_NORM_FILE
    path.parent.mkdir()
    save_tensors(layer.state_dict(), path)
    tokens = "the patch tokens" if other == "patch" else "the CLS token"
    what = f"the LayerNorm (weight and bias [{backbone.dim}], eps {layer.eps}) that {tokens} had in training"
    return {"file": OTHER_NORM_FILE, "what": f"{what}; put it in the final norm's place for them"}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """As safetensors, with the metadata that transformers asks of a file."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # its own save_file makes a file that nobody else may read, whatever the umask
    path.write_bytes(safetensors.torch.save(whole, metadata={"format": "pt"}))


def _final_norm(backbone: VisionTransformer, norm: Norm) -> nn.LayerNorm:
    return backbone.norm_cls if norm == "cls" else backbone.norm_patch
