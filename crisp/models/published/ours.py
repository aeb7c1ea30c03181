"""A run of our own, or one of its checkpoints: patches through the patch norm, CLS through the CLS norm.

Axes: B images, D width.
"""

from pathlib import Path

from torch import Tensor

from crisp.models.frozen import BlockTokens, FrozenBackbone
from crisp.models.published.attention import caught_attention
from crisp.models.published.hf_folder import is_hf_folder
from crisp.models.published.positions import check_last, patch_grid
from crisp.models.published.system import Built
from crisp.models.published.vit import IMAGENET_MEAN, IMAGENET_STD
from crisp.models.trained import Trained, load_trained
from crisp.runs import CHECKPOINTS, CONFIG_FILE


class TrainedBackbone(FrozenBackbone):
    """The teacher's backbone of a run.

    Args:
        trained: what `crisp.models.trained.load_trained` read.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.vit = trained.network.backbone
        self.dim, self.depth, self.patch_px = self.vit.dim, len(self.vit.blocks), self.vit.patch_px
        self.native_px = self.vit.base_grid[0] * self.patch_px
        self.facts = {"heads": self.vit.num_heads, "positions": self.vit.position_resize}
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        """See FrozenBackbone."""
        check_last(last, self.depth)
        patch_grid(images, self.patch_px)
        return [
            BlockTokens(cls=self.vit.norm_cls(x[:, 0]), patches=self.vit.norm_patch(x[:, 1:]))
            for x in self.vit.last_blocks(images, blocks=last)
        ]

    def cls_attention(self, images: Tensor) -> Tensor:
        """See FrozenBackbone."""
        attention = caught_attention(self.vit.blocks[-1].attn, lambda: self(images))
        return attention[:, :, 0, 1:]


def is_run(path: Path) -> bool:
    """Whether a folder is a run of our own, or one of its checkpoints."""
    if not path.is_dir() or is_hf_folder(path):  # which has a config.json, too
        return False
    above = path.resolve().parent
    return (path / CONFIG_FILE).is_file() or (above.name == CHECKPOINTS and (above.parent / CONFIG_FILE).is_file())


def load_ours(path: Path) -> tuple[Built, str]:
    """The teacher's backbone, and its name for tables.

    Raises:
        CrispError: as `load_trained`.
    """
    trained = load_trained(path)
    backbone = TrainedBackbone(trained)
    count = len(backbone.state_dict())
    account = f"the teacher's backbone of {trained.checkpoint}: {count} tensors loaded, its heads left out"
    name = f"CRISP {trained.config.model.arch} step {trained.step}"
    return Built(backbone=backbone, arch_name=trained.config.model.arch, account=account), name
