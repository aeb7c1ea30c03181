"""MAE (He et al., 2022; github.com/facebookresearch/mae): encoders, and whole models whose decoder is left out."""

from collections.abc import Mapping
from typing import Any

from crisp.models.published.keys import KeyRules
from crisp.models.published.positions import PositionRule
from crisp.models.published.vit_system import PLAIN_VIT, RUN_STATE, VitSystem, has_key, is_plain_vit

_HEADS = {768: 12, 1024: 16, 1280: 16}


class Mae(VitSystem):
    """See the module. Its position embeddings are fixed sin-cos values, which the file holds."""

    name = "mae"
    title = "MAE"
    positions: PositionRule = "size"
    rules = KeyRules(
        weights=((rf"(?:model\.)?{PLAIN_VIT}", r"\1"),),
        ignored=(
            (r"(?:model\.)?decoder_.*", "its decoder"),
            (r"(?:model\.)?mask_token", "the decoder's mask token"),
            *RUN_STATE,
            (r"scaler(\..*)?", "state of its loss scaler"),
        ),
    )

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """By the decoder, or a bare ViT in `model`, as its encoders come."""
        inner = state.get("model")
        bare = isinstance(inner, Mapping) and is_plain_vit(inner.keys())
        return bare or has_key(state, r"(?:model\.)?decoder_pos_embed")

    def heads(self, width: int) -> int:
        """12 of ViT-B, 16 of ViT-L and ViT-H."""
        return _HEADS.get(width) or super().heads(width)
