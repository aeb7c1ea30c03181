"""Web-DINO (Fan et al., 2025; github.com/facebookresearch/webssl): DINOv2's code in sizes of its own, 0.3 to 7 billion.

Its own files, the teachers of its runs (`…_ssl_teacher.pth`), and Hugging Face's folders. All have gated MLPs.
"""

from collections.abc import Mapping
from typing import Any

from crisp.models.published.dinov2 import Dinov2, gated_width
from crisp.models.published.vit_system import has_key

# of 1 billion parameters and fewer: DINOv2's 64 channels per head; above, 128
_HEADS = {1024: 16, 1536: 24, 2688: 21, 3072: 24, 3584: 28, 4096: 32}
_DINOV2_GIANT = (1536, 1 + 37 * 37)  # width, position embeddings (518 px); Web-DINO's of that width has 224 px


class Webdino(Dinov2):
    """See the module."""

    name = "webdino"
    title = "Web-DINO"

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """As DINOv2, with gated MLPs, no registers, and not the one size that DINOv2 has of these."""
        size = gated_width(state)
        own = size is not None and size != _DINOV2_GIANT and not has_key(state, r"(?:.*\.)?register_tokens")
        return own and super().recognise(state)

    def heads(self, width: int) -> int:
        """As published for its widths."""
        return _HEADS.get(width) or super().heads(width)
