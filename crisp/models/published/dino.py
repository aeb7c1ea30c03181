"""DINO (Caron et al., 2021; github.com/facebookresearch/dino): backbones, and the teachers of whole runs."""

from collections.abc import Mapping
from typing import Any

from crisp.models.published.keys import KeyRules
from crisp.models.published.vit_system import HEAD, OF_A_RUN, PLAIN_VIT, RUN_STATE, STUDENT, VitSystem, is_plain_vit


class Dino(VitSystem):
    """See the module."""

    name = "dino"
    title = "DINO"
    rules = KeyRules(
        weights=((OF_A_RUN + PLAIN_VIT, r"\1"),),
        ignored=(STUDENT, HEAD, *RUN_STATE, (r"dino_loss(\..*)?", "its loss's centre")),
    )

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """A run with its loss, or a bare ViT: extracted backbones of iBOT, SiT, CrOC and CrIBo are the same."""
        run = "dino_loss" in state and not {"cls_queue_cpu", "centroids_queue_cpu"} & state.keys()
        return run or is_plain_vit(state.keys())
