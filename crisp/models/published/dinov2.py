"""DINOv2 (Oquab et al., 2023; github.com/facebookresearch/dinov2), with and without registers (Darcet et al., 2024).

Three layouts: its own backbones; the teacher of its runs, with blocks in chunks (`blocks.CHUNK.BLOCK.*`, BLOCK counted
from the first); and Hugging Face's port, as a file or a folder. Each resizes position embeddings in its own way: the
published backbones without registers keep DINO's factor with .1, those with registers have a size and antialiasing; the
port has a size, with antialiasing where there are registers.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crisp.models.published.keys import KeyRules, flatten
from crisp.models.published.positions import PositionRule
from crisp.models.published.vit_system import OF_A_RUN, PLAIN_VIT, VitSystem, has_key

_BLOCK = r"blocks\.(?:\d+\.)?(\d+)\."
_HF_BLOCK = r"encoder\.layer\.(\d+)\."
_LEAF = r"(weight|bias)"

_OWN = (
    (OF_A_RUN + PLAIN_VIT, r"\1"),
    (OF_A_RUN + "register_tokens", "reg_token"),
    (rf"{OF_A_RUN}{_BLOCK}(norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.{_LEAF}", r"blocks.\1.\2.\3"),
    (rf"{OF_A_RUN}{_BLOCK}(ls[12]\.gamma)", r"blocks.\1.\2"),
    (rf"{OF_A_RUN}{_BLOCK}mlp\.w12\.{_LEAF}", r"blocks.\1.mlp.fc1.\2"),
    (rf"{OF_A_RUN}{_BLOCK}mlp\.w3\.{_LEAF}", r"blocks.\1.mlp.fc2.\2"),
)
_HF = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.register_tokens", "reg_token"),
    (rf"embeddings\.patch_embeddings\.projection\.{_LEAF}", r"patch_embed.proj.\1"),
    (rf"{_HF_BLOCK}(norm[12]|mlp\.fc[12])\.{_LEAF}", r"blocks.\1.\2.\3"),
    (rf"{_HF_BLOCK}attention\.attention\.(query|key|value)\.{_LEAF}", r"blocks.\1.attn.\2.\3"),
    (rf"{_HF_BLOCK}attention\.output\.dense\.{_LEAF}", r"blocks.\1.attn.proj.\2"),
    (rf"{_HF_BLOCK}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (rf"{_HF_BLOCK}mlp\.weights_in\.{_LEAF}", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_HF_BLOCK}mlp\.weights_out\.{_LEAF}", r"blocks.\1.mlp.fc2.\2"),
    (rf"layernorm\.{_LEAF}", r"norm.\1"),
)


class Dinov2(VitSystem):
    """See the module."""

    name = "dinov2"
    title = "DINOv2"
    rules = KeyRules(
        weights=(*_OWN, *_HF),
        ignored=(
            (r"(?:.*\.)?mask_token", "the mask token: nothing is masked"),
            (r"teacher\.(?:module\.)?(?:dino|ibot)_head\..*", "its projection heads"),
        ),
    )

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """By its LayerScale beside its mask token, under its own names or Hugging Face's."""
        scaled = has_key(state, rf"{OF_A_RUN}{_BLOCK}ls1\.gamma") or has_key(
            state, rf"{_HF_BLOCK}layer_scale1\.lambda1"
        )
        return scaled and has_key(state, r"(?:.*\.)?mask_token")

    def positions_for(self, names: set[str]) -> PositionRule:
        """See the module."""
        if "reg_token" in names:
            return "size, antialias"
        return "size" if any(name.startswith("embeddings.") for name in names) else "scale .1"

    def convert(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Queries, keys and values of Hugging Face's port in one matrix."""
        merged: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(r"(blocks\.\d+\.attn\.)query\.(weight|bias)", name)
            if match:
                parts = [tensors.get(f"{match[1]}{part}.{match[2]}") for part in ("query", "key", "value")]
                merged[f"{match[1]}qkv.{match[2]}"] = torch.cat([part for part in parts if part is not None])
            elif not re.fullmatch(r"blocks\.\d+\.attn\.(key|value)\.(weight|bias)", name):
                merged[name] = tensor
        return merged


def gated_width(state: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and number of position embeddings of a backbone in one of these layouts, if its MLPs are gated."""
    flat = flatten(state)
    if not any(re.search(r"\.mlp\.(w12|weights_in)\.weight$", key) for key in flat):
        return None
    shapes = [v.shape for k, v in flat.items() if re.fullmatch(r"(?:.*\.)?(pos_embed|position_embeddings)", k)]
    return (shapes[0][-1], shapes[0][-2]) if shapes else None
