"""What the loaders of plain Vision Transformers share: names of tensors, and the way from a file to a backbone."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from crisp.models.frozen import FrozenBackbone
from crisp.models.published.keys import KeyRules, flatten, sort_keys
from crisp.models.published.positions import PositionRule
from crisp.models.published.system import Built, System
from crisp.models.published.vit import frozen_vit, sixty_four_per_head

# A plain ViT under timm's names, which most systems took over. One group: the name.
PLAIN_VIT = (
    r"(cls_token|pos_embed|patch_embed\.proj\.(?:weight|bias)|norm\.(?:weight|bias)"
    r"|blocks\.\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias))"
)

# What DINO's trainer and those made from it write beside the networks.
RUN_STATE = (
    (r"optimizer(\..*)?", "state of its optimiser"),
    (r"epoch", "where its run stood"),
    (r"args", "its command line"),
    (r"fp16_scaler(\..*)?", "state of its loss scaler"),
)
# Of a run, the teacher is taken, as the systems' own evaluations do.
STUDENT = (r"student\..*", "the student: the teacher is taken")
HEAD = (r"teacher\.(?:module\.)?head\..*", "its projection head")
# Bare, as a network with its head, or as the teacher of a run; `module.` is DistributedDataParallel's.
OF_A_RUN = r"(?:teacher\.)?(?:module\.)?(?:backbone\.)?"

_SIZES = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H", 1408: "g", 1536: "g"}
_SIZES |= {2688: "2B", 3072: "3B", 3584: "5B", 4096: "7B"}  # Web-DINO's, by their parameters


class VitSystem(System):
    """A plain Vision Transformer under names that `rules` translate to timm's.

    Attributes:
        rules: the system's keys.
        positions: how its code resizes position embeddings.
    """

    rules: KeyRules
    positions: PositionRule = "scale .1"

    def build(self, state: Mapping[str, Any], source: str) -> Built:
        """See System."""
        keys = sort_keys(state, self.rules, source=source, system=self.title)
        rule = self.positions_for(keys.tensors.keys() | state.keys())
        backbone = frozen_vit(self.convert(keys.tensors), source=source, heads=self.heads, positions=rule)
        side = backbone.native_px // backbone.patch_px
        note = f"positions of {side}×{side} patches interpolated for other grids (bicubic, {rule})"
        return Built(backbone=backbone, arch_name=arch_name(backbone), account=keys.account(note))

    def heads(self, width: int) -> int:
        """Number of attention heads of a width."""
        return sixty_four_per_head(width)

    def positions_for(self, names: set[str]) -> PositionRule:
        """The rule of a file with these keys."""
        return self.positions

    def convert(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What renaming alone cannot do."""
        return tensors


def arch_name(backbone: FrozenBackbone) -> str:
    """`ViT-S/16`; sizes without a name of their own by width and depth."""
    size = _SIZES.get(backbone.dim, f"{backbone.dim}×{backbone.depth}")
    return f"ViT-{size}/{backbone.patch_px}"


def is_plain_vit(keys: Any) -> bool:
    """Whether these keys are those of a bare ViT and nothing else."""
    return bool(keys) and all(re.fullmatch(rf"(?:module\.)?(?:backbone\.)?{PLAIN_VIT}", key) for key in keys)


def has_key(state: Mapping[str, Any], pattern: str) -> bool:
    """Whether any flat key is wholly matched."""
    return any(re.fullmatch(pattern, key) for key in flatten(state))
