"""The engine: timm's Vision Transformer behind the interface of a frozen backbone, its architecture read from shapes.

A position embedding of CLS is added to the CLS token once, at loading: the sum is what the systems compute each time.
Axes: B images, n patches, R registers, D width, h hidden width of the MLP.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from crisp.errors import CrispError
from crisp.models.frozen import BlockTokens, FrozenBackbone
from crisp.models.published.attention import caught_attention
from crisp.models.published.keys import few, own_copy
from crisp.models.published.positions import (
    PositionRule,
    all_finite,
    check_last,
    grid_side,
    patch_grid,
    resize_positions,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FrozenVit(FrozenBackbone):
    """timm's Vision Transformer with a system's own rule for position embeddings.

    Args:
        vit: timm's, with position embeddings of patches alone [1, N, D] and at most a CLS token and registers before
            the patches.
        positions: the rule for other grids than its own.
        mean, std: see FrozenBackbone.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        positions: PositionRule,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.vit: Any = vit
        self.positions: PositionRule = positions
        self.dim, self.depth = vit.embed_dim, len(vit.blocks)
        self.patch_px: int = vit.patch_embed.patch_size[0]
        self.native_px: int = vit.patch_embed.img_size[0]
        self.mean, self.std = mean, std
        self.facts = {"heads": self.vit.blocks[0].attn.num_heads, "positions": positions, "eps": vit.norm.eps}
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        """See FrozenBackbone."""
        check_last(last, self.depth)
        x = self._embed(images)
        taken = []
        for i, block in enumerate(self.vit.blocks):
            x = block(x)
            if i >= self.depth - last:
                tokens = self.vit.norm(x)
                cls = None if self.vit.cls_token is None else tokens[:, 0]
                taken.append(BlockTokens(cls=cls, patches=tokens[:, self.vit.num_prefix_tokens :]))
        return taken

    def cls_attention(self, images: Tensor) -> Tensor:
        """See FrozenBackbone."""
        if self.vit.cls_token is None:
            return super().cls_attention(images)
        attention = caught_attention(self.vit.blocks[-1].attn, lambda: self(images))
        return attention[:, :, 0, self.vit.num_prefix_tokens :]

    def _embed(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, prefix + n, D]."""
        grid = patch_grid(images, self.patch_px)
        table = resize_positions(self.vit.pos_embed, grid, self.positions)
        patches = self.vit.patch_embed.proj(images.to(table.dtype)).flatten(2).transpose(1, 2) + table
        prefix = [token for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]
        return torch.cat([*(token.expand(len(images), -1, -1) for token in prefix), patches], dim=1)


def frozen_vit(
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    heads: Callable[[int], int],
    positions: PositionRule,
    eps: float = 1e-6,
) -> FrozenVit:
    """A backbone of the architecture that the shapes tell.

    Args:
        tensors: under timm's names, with `reg_token` [1, R, D] for registers. `pos_embed` [1, (1+)N, D] has an entry of
            CLS where there is a CLS token. An MLP is gated (SwiGLU) where `mlp.fc1` is twice as wide as `mlp.fc2`.
        source: the file, for messages.
        heads: number of attention heads of a width, as the system fixes it.
        positions: see `PositionRule`.
        eps: of the norms.

    Raises:
        CrispError: a tensor is missing or has another shape than the rest implies, or holds NaN.
    """
    weights = {name: own_copy(tensor) for name, tensor in tensors.items()}
    vit = _timm_vit(weights, source=source, heads=heads, eps=eps)
    if vit.cls_token is not None:
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    check_weights(weights, vit, source)
    vit.load_state_dict(weights, assign=True)
    return FrozenVit(vit, positions=positions)


def _timm_vit(weights: Mapping[str, Tensor], *, source: str, heads: Callable[[int], int], eps: float) -> Any:
    """timm's model without memory for its weights."""
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise CrispError(f"{source}: no {few(missing)}, so no Vision Transformer that is known; name its system")
    width, channels, *patch = weights["patch_embed.proj.weight"].shape
    if channels != 3 or len(patch) != 2 or patch[0] != patch[1]:
        shape = "×".join(map(str, weights["patch_embed.proj.weight"].shape))
        raise CrispError(f"{source}: patch_embed.proj.weight is {shape}, not D×3×p×p; give a model of RGB images")
    cls = "cls_token" in weights
    side = grid_side(weights["pos_embed"].shape[1] - cls, source=source)
    widened, hidden = weights["blocks.0.mlp.fc1.weight"].shape[0], weights["blocks.0.mlp.fc2.weight"].shape[1]
    gated = widened == 2 * hidden
    return VisionTransformer(
        img_size=side * patch[0],
        patch_size=patch[0],
        num_classes=0,
        global_pool="",
        embed_dim=width,
        depth=_depth(weights),
        num_heads=heads(width),
        mlp_ratio=(widened + 0.5) / width,  # timm takes the floor of ratio · width
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        init_values=1.0 if "blocks.0.ls1.gamma" in weights else None,
        class_token=cls,
        no_embed_class=True,
        reg_tokens=weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        weight_init="skip",
        norm_layer=partial(nn.LayerNorm, eps=eps),
        act_layer=nn.SiLU if gated else nn.GELU,
        mlp_layer=SwiGLUPacked if gated else Mlp,
        device="meta",
    )


def _depth(weights: Mapping[str, Tensor]) -> int:
    return 1 + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name)))


def check_weights(weights: Mapping[str, Tensor], network: nn.Module, source: str) -> None:
    """That a network can take these weights, by name.

    Raises:
        CrispError: a tensor is missing, has no place or another shape, or holds NaN.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing, surplus = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing:
        raise CrispError(f"{source}: it lacks {len(missing)} tensors ({few(missing)}); download the file again")
    if surplus:
        raise CrispError(f"{source}: {few(surplus)} have no place in the architecture that its other tensors imply")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            got, want = ("×".join(map(str, s)) for s in (weights[name].shape, shape))
            raise CrispError(f"{source}: {name} is {got}, its other tensors imply {want}; the file is damaged")
        if not all_finite(weights[name]):
            raise CrispError(f"{source}: {name} holds NaN or infinity; take another checkpoint")


def sixty_four_per_head(width: int) -> int:
    """Heads of ViTs whose every head has 64 channels.

    Raises:
        CrispError: the width is no multiple of it.
    """
    if width % 64:
        raise CrispError(f"width {width}: no multiple of 64, so that the number of attention heads cannot be known")
    return width // 64
