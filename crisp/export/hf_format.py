"""A folder for transformers: `ViTModel.from_pretrained(OUT, add_pooling_layer=False)`.

The files are written without transformers: the names are those under which every version of it saves and loads a ViT.
Axes: D width.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn

from crisp.errors import CrispError
from crisp.export.backbone import WEIGHTS_FILE, plain_weights, save_tensors
from crisp.export.config import Norm
from crisp.export.preparation import preparation_for
from crisp.models.foreign import fold_layer_scales
from crisp.models.trained import Trained
from crisp.models.vit import LAYER_NORM_EPS, VisionTransformer

_STEM = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def write_hf(trained: Trained, norm: Norm, folder: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json. A LayerScale is folded, which is exact.

    Args:
        trained: what to export.
        norm: the final norm of ViTModel (`layernorm`).
        folder: an empty one.

    Raises:
        CrispError: the backbone has a part that ViTModel lacks.
    """
    backbone, arch = trained.network.backbone, trained.config.model.arch
    _refuse_unlike(backbone, arch)
    weights = hf_weights(fold_layer_scales(plain_weights(backbone, norm)), arch=arch)
    save_tensors(weights, folder / WEIGHTS_FILE)
    _write_json(folder / "config.json", _model_config(trained))
    _write_json(folder / "preprocessor_config.json", _processor_config(trained.config.views.global_px))


def hf_weights(weights: Mapping[str, Tensor], *, arch: str) -> dict[str, Tensor]:
    """Weights under ViTModel's names.

    Args:
        weights: under timm's names, with one `norm` and no LayerScale; `attn.qkv.weight` is [3·D, D].
        arch: the model's name, for messages.

    Raises:
        CrispError: a weight that ViTModel has no place for.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if block and block[2] == "attn.qkv":
            for part, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"encoder.layer.{block[1]}.attention.attention.{part}.{leaf}"] = value
        elif block and block[2] in _BLOCK:
            renamed[f"encoder.layer.{block[1]}.{_BLOCK[block[2]]}.{leaf}"] = tensor
        elif name in _STEM:
            renamed[_STEM[name]] = tensor
        elif module in _STEM:
            renamed[f"{_STEM[module]}.{leaf}"] = tensor
        else:
            raise CrispError(_refusal(arch, f"a weight {name}"))
    return renamed


def _refuse_unlike(backbone: VisionTransformer, arch: str) -> None:
    """What the names of the weights do not tell."""
    biased = [backbone.patch_embed.proj]
    blocks: list[Any] = [*backbone.blocks]
    for block in blocks:
        if type(block.mlp) is not Mlp:
            raise CrispError(_refusal(arch, "an MLP of another kind"))
        act = block.mlp.act
        biased += [block.attn.proj, block.mlp.fc1, block.mlp.fc2]
        unlike = {
            "an activation other than the exact GELU": not isinstance(act, nn.GELU) or act.approximate != "none",
            "heads of another width than D / heads": block.attn.qkv.out_features != 3 * backbone.dim,
            f"norms other than LayerNorms of eps {LAYER_NORM_EPS}": any(
                not isinstance(norm, nn.LayerNorm) or norm.eps != LAYER_NORM_EPS for norm in (block.norm1, block.norm2)
            ),
        }
        for what, present in unlike.items():
            if present:
                raise CrispError(_refusal(arch, what))
    if any(layer.bias is None for layer in biased):
        raise CrispError(_refusal(arch, "layers without a bias"))


def _refusal(arch: str, what: str) -> str:
    return f"model.arch={arch}: it has {what}, which transformers' ViTModel lacks; take another --format"


def _model_config(trained: Trained) -> dict[str, Any]:
    backbone = trained.network.backbone
    first: Any = backbone.blocks[0]
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": backbone.dim,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": backbone.num_heads,
        "intermediate_size": first.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": trained.config.views.global_px,
        "patch_size": backbone.patch_px,
        "num_channels": 3,
        "qkv_bias": first.attn.qkv.bias is not None,
    }


def _processor_config(image_px: int) -> dict[str, Any]:
    """Of the processor that resizes the shorter side and cuts the middle out; ViT's own would distort the image."""
    prepared = preparation_for(image_px)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": prepared.resize_px},
        "resample": 3,  # PIL's number of bicubic
        "do_center_crop": True,
        "crop_size": {"height": prepared.crop_px, "width": prepared.crop_px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": prepared.mean,
        "image_std": prepared.std,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
