"""CrIBo (Lebailly et al., 2024; github.com/tileb1/CrIBo): the teachers of whole runs."""

from collections.abc import Mapping
from typing import Any

from crisp.models.published.keys import KeyRules
from crisp.models.published.vit_system import HEAD, OF_A_RUN, PLAIN_VIT, RUN_STATE, STUDENT, VitSystem


class Cribo(VitSystem):
    """See the module."""

    name = "cribo"
    title = "CrIBo"
    rules = KeyRules(
        weights=((OF_A_RUN + PLAIN_VIT, r"\1"),),
        ignored=(
            STUDENT,
            HEAD,
            *RUN_STATE,
            (r"dino_loss(\..*)?", "its loss's centres"),
            (r"(?:centroids|cls|cpv)_queue_cpu", "its queues of neighbours"),
        ),
    )

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """By its queues."""
        return bool({"cls_queue_cpu", "centroids_queue_cpu"} & state.keys())
