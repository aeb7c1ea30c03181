"""SiT (Atito et al., 2021; github.com/Sara-Ahmed/SiT): the teachers of whole runs."""

from collections.abc import Mapping
from typing import Any

from crisp.models.published.keys import KeyRules
from crisp.models.published.vit_system import HEAD, OF_A_RUN, PLAIN_VIT, RUN_STATE, STUDENT, VitSystem, has_key


class Sit(VitSystem):
    """See the module."""

    name = "sit"
    title = "SiT"
    rules = KeyRules(
        weights=((OF_A_RUN + PLAIN_VIT, r"\1"),),
        ignored=(
            STUDENT,
            HEAD,
            (r"teacher\.(?:module\.)?head_recons\..*", "its reconstruction head"),
            *RUN_STATE,
        ),
    )

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """By the reconstruction head."""
        return has_key(state, r"teacher\.(?:module\.)?head_recons\..*")
