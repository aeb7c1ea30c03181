"""iBOT (Zhou et al., 2021; github.com/bytedance/ibot): backbones, and the teachers of whole runs."""

from collections.abc import Mapping
from typing import Any

from crisp.models.published.keys import KeyRules
from crisp.models.published.vit_system import (
    HEAD,
    OF_A_RUN,
    PLAIN_VIT,
    RUN_STATE,
    STUDENT,
    VitSystem,
    has_key,
    is_plain_vit,
)


class Ibot(VitSystem):
    """See the module."""

    name = "ibot"
    title = "iBOT"
    rules = KeyRules(
        weights=((rf"(?:state_dict\.)?{OF_A_RUN}{PLAIN_VIT}", r"\1"),),
        ignored=(
            STUDENT,
            HEAD,
            *RUN_STATE,
            (r"ibot_loss(\..*)?", "its loss's centres"),
            (r"(?:.*\.)?masked_embed", "the mask token: nothing is masked"),
        ),
    )

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """A run with its loss, a mask token under its name, or a bare ViT in `state_dict`, as its backbones come."""
        inner = state.get("state_dict")
        bare = state.keys() == {"state_dict"} and isinstance(inner, Mapping) and is_plain_vit(inner.keys())
        return "ibot_loss" in state or bare or has_key(state, r"(?:.*\.)?masked_embed")
