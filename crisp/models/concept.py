"""Mask-guided concept token aggregation (paper, 3.3): the patches of a region become one token.

Eq. 3–5 put a concept token before the patches and let it, and nothing else, attend to the region. So only its row
is ever computed: one query per region against keys and values that all K regions of an image share, O(n·D) instead
of O(n²·D). It does not attend to itself, and for depth > 1 every block reads the same patch tokens.
Axes: B images, K regions, n patches, D width, h heads.
"""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from crisp.models.vit import LAYER_NORM_EPS


class ConceptBlock(nn.Module):
    """Pre-norm transformer block of one query per region: the backbone's block (biases, GELU, MLP ratio 4).

    No stochastic depth: with one token per region, dropping the attention would drop the region.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, hidden_features=4 * dim)

    def forward(self, concepts: Tensor, patches: Tensor, regions: Tensor) -> Tensor:
        """Concepts [B, K, D] after attending to the patches [B, n, D] of their regions [B, K, n] bool (none empty)."""
        heads = (self.num_heads, -1)
        q = self.q(self.norm1(concepts)).unflatten(-1, heads).transpose(1, 2)  # [B, h, K, D/h]
        kv = self.kv(self.norm1(patches)).unflatten(-1, (2, *heads))
        k, v = kv.permute(2, 0, 3, 1, 4)  # [B, h, n, D/h] each
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, h, K, n]
        weights = scores.masked_fill(~regions[:, None], -torch.inf).softmax(dim=-1)
        attended = (weights @ v).transpose(1, 2).flatten(2)  # [B, K, D]
        concepts = concepts + self.proj(attended)
        return concepts + self.mlp(self.norm2(concepts))


class ConceptAggregator(nn.Module):
    """One token per region.

    A region without a patch attends to patch 0 instead, so that its token and all gradients are finite; the loss
    gives it no weight.

    Args:
        dim: D, the backbone's width.
        num_heads: the backbone's.
        depth: L blocks. 0 is the plain mean of the region's patches: no concept token, and no norm.
        own_norm: end in a LayerNorm of its own; else the caller norms the tokens.
    """

    def __init__(self, dim: int, num_heads: int, *, depth: int, own_norm: bool) -> None:
        super().__init__()
        self.depth = depth
        if depth > 0:
            # like a CLS token, but the region has no one position: no position embedding
            self.concept_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.blocks = nn.ModuleList(ConceptBlock(dim, num_heads) for _ in range(depth))
            self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS) if own_norm else nn.Identity()
            nn.init.trunc_normal_(self.concept_token, std=0.02)
            self.apply(_init_linear)

    def forward(self, patches: Tensor, regions: Tensor) -> Tensor:
        """Region tokens [B, K, D] of patches [B, n, D] and regions [B, K, n] bool."""
        regions = _never_empty(regions)
        if self.depth == 0:
            share = regions.to(patches.dtype)
            return share @ patches / share.sum(-1, keepdim=True)
        concepts = self.concept_token.expand(*regions.shape[:2], -1)
        for block in self.blocks:
            concepts = block(concepts, patches, regions)
        tokens: Tensor = self.norm(concepts)
        return tokens


def _never_empty(regions: Tensor) -> Tensor:
    """The same masks, with patch 0 in those that hold none."""
    dummy = torch.zeros_like(regions[0, 0])
    dummy[0] = True
    return torch.where(regions.any(-1, keepdim=True), regions, dummy)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
