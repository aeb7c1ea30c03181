"""I-JEPA (Assran et al., 2023; github.com/facebookresearch/ijepa): whole runs, of which the target encoder is taken.

It has no CLS token. Its code cannot resize position embeddings (it takes the first patch's for that of a CLS token), so
the plainest rule is taken for other grids: bicubic to the size.
"""

from collections.abc import Mapping
from typing import Any

from crisp.models.published.keys import KeyRules
from crisp.models.published.positions import PositionRule
from crisp.models.published.vit_system import PLAIN_VIT, VitSystem

_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16}


class Ijepa(VitSystem):
    """See the module."""

    name = "ijepa"
    title = "I-JEPA"
    positions: PositionRule = "size"
    rules = KeyRules(
        weights=((rf"target_encoder\.(?:module\.)?{PLAIN_VIT}", r"\1"),),
        ignored=(
            (r"encoder\..*", "the context encoder: the target encoder is taken"),
            (r"predictor\..*", "its predictor"),
            (r"opt(\..*)?", "state of its optimiser"),
            (r"scaler(\..*)?", "state of its loss scaler"),
            (r"epoch|loss|batch_size|world_size|lr", "where its run stood"),
        ),
    )

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """By the network's name."""
        return "target_encoder" in state

    def heads(self, width: int) -> int:
        """12 of ViT-B, 16 of the sizes above it."""
        return _HEADS.get(width) or super().heads(width)
