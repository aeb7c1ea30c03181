"""Data2Vec 2.0 (Baevski et al., 2022): a post-norm ViT with fixed positions and a CLS token that has none.

After https://github.com/facebookresearch/fairseq, `examples/data2vec/models` at
3d262bb25690e4eb2e7d3c1309b1e9c406ca4b99. Patches get their sine and cosine positions, CLS comes first, all go through a
norm, and then through blocks that norm *after* each branch was added. So the last norm is in the last block, and
what a block puts out is normed already.

Axes: B images, n patches, N = 1 + n, D width, h heads, d = D / h.
"""

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from crisp.models.frozen import BlockTokens, FrozenBackbone

NORM_EPS = 1e-6
MLP_RATIO = 4


class PostNormAttention(nn.Module):
    """Self-attention with biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, N, D] → query, key, value [B, h, N, d] each."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        mixed = F.scaled_dot_product_attention(*self.split(x))
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class PostNormMlp(nn.Module):
    """Two layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class PostNormBlock(nn.Module):
    """Attention, then an MLP, each added to its input; the sum is normed."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = PostNormAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = PostNormMlp(dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        x = self.norm1(x + self.attn(x))
        out: Tensor = self.norm2(x + self.mlp(x))
        return out


class Data2VecBackbone(FrozenBackbone):
    """The image encoder of Data2Vec 2.0: the blocks of its modality and those that modalities share, one after another.

    Args:
        dim, depth, heads, patch_px: of the network; `depth` counts both kinds of blocks.
        side: of the square grid of positions, in patches.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, *, dim: int, depth: int, heads: int, patch_px: int, side: int) -> None:
        super().__init__()
        self.dim, self.depth, self.patch_px, self.native_px = dim, depth, patch_px, patch_px * side
        self.side = side
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=patch_px, stride=patch_px)
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm_pre = nn.LayerNorm(dim, eps=NORM_EPS)
        self.blocks = nn.ModuleList(PostNormBlock(dim, heads) for _ in range(depth))

    def tokens(self, images: Tensor) -> Tensor:
        """What the first block is given.

        Args:
            images: [B, 3, H, W] normalised.

        Returns:
            [B, 1 + n, D], CLS first.
        """
        grid = self.patch_embed(images)  # [B, D, rows, columns]
        positions = self.pos_embed
        if tuple(grid.shape[2:]) != (self.side, self.side):
            # fairseq has one size only; this is how CAPI's evaluation of Data2Vec (through timm) resizes them
            positions = resample_abs_pos_embed(positions, list(grid.shape[2:]), num_prefix_tokens=0)
        patches = grid.flatten(2).transpose(1, 2) + positions
        x: Tensor = self.norm_pre(torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1))
        return x

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        """As `FrozenBackbone.forward`; each block's own last norm is the final one."""
        x = self.tokens(images)
        outputs: list[BlockTokens] = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index >= self.depth - last:
                outputs.append(BlockTokens(cls=x[:, 0], patches=x[:, 1:]))
        return outputs

    def cls_attention(self, images: Tensor) -> Tensor:
        """As `FrozenBackbone.cls_attention`."""
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        query, key, _ = self.blocks[-1].attn.split(x)
        logits = query[:, :, :1] @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # [B, h, 1, N]
        return logits.softmax(dim=-1)[:, :, 0, 1:]
