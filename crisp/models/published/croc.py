"""CrOC (Stegmüller et al., 2023; github.com/stegmuel/CrOC): the teachers of whole runs."""

from collections.abc import Mapping
from typing import Any

from crisp.models.published.keys import KeyRules
from crisp.models.published.vit_system import HEAD, OF_A_RUN, PLAIN_VIT, RUN_STATE, STUDENT, VitSystem


class Croc(VitSystem):
    """See the module."""

    name = "croc"
    title = "CrOC"
    rules = KeyRules(
        weights=((OF_A_RUN + PLAIN_VIT, r"\1"),),
        ignored=(STUDENT, HEAD, *RUN_STATE, (r"croc_loss(\..*)?", "its loss's centres")),
    )

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """By the loss's name."""
        return "croc_loss" in state
