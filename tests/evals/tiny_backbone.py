"""A small frozen model for the tests of evaluations: random weights, a few milliseconds per image."""

import torch
from torch import Tensor, nn

from crisp.errors import CrispError
from crisp.models.frozen import BlockTokens, FrozenBackbone, FrozenModel


class TinyBackbone(FrozenBackbone):
    """Patches through a linear map and `depth` residual layers that mix in the image's mean; any image size.

    Args:
        with_cls: False for a model without a CLS token.
    """

    def __init__(
        self, *, dim: int = 8, depth: int = 4, heads: int = 2, patch_px: int = 16, with_cls: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.dim, self.depth, self.patch_px, self.native_px = dim, depth, patch_px, 14 * patch_px
        self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.heads, self.with_cls = heads, with_cls
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Conv2d(3, dim, patch_px, patch_px)
            self.blocks = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(depth))
            self.norm = nn.LayerNorm(dim)
        self.requires_grad_(False).eval()

    def _blocks(self, images: Tensor) -> list[Tensor]:
        patches = self.embed(images).flatten(2).transpose(1, 2)  # [B, n, D]
        tokens = torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)  # [B, 1 + n, D], CLS first
        outputs = []
        for block in self.blocks:
            mean = tokens.mean(dim=1, keepdim=True).expand_as(tokens)
            tokens = tokens + torch.tanh(block(torch.cat([tokens, mean], dim=2)))
            outputs.append(tokens)
        return outputs

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        normed = [self.norm(tokens) for tokens in self._blocks(images)[-last:]]
        return [BlockTokens(cls=t[:, 0] if self.with_cls else None, patches=t[:, 1:]) for t in normed]

    def cls_attention(self, images: Tensor) -> Tensor:
        if not self.with_cls:
            raise CrispError("tiny: has no CLS token")
        tokens = self._blocks(images)[-1].unflatten(2, (self.heads, -1))  # [B, 1 + n, h, d]
        logits = torch.einsum("bhd,bnhd->bhn", tokens[:, 0], tokens)
        return logits.softmax(dim=2)[:, :, 1:]


def tiny_model(**options: int | bool) -> FrozenModel:
    """A model whose fingerprint tells its options apart."""
    backbone = TinyBackbone(**options)  # type: ignore[arg-type]
    described = "-".join(f"{name}{value}" for name, value in sorted(options.items()))
    return FrozenModel(
        backbone=backbone,
        name="tiny ViT",
        source="tiny:",
        fingerprint=f"tiny-{described}",
        account="all weights drawn",
    )
