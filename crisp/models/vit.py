"""The backbone: a timm Vision Transformer with a mask token, one final norm per token kind, and any patch grid.

Parameter names are timm's (`patch_embed.proj`, `cls_token`, `pos_embed`, `blocks.i`), which are also iBOT's.
Axes: B images, n patches, D width.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from timm.layers import Attention
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from crisp.config import ModelConfig
from crisp.errors import CrispError
from crisp.models.stochastic_depth import BlockRows, depth_rates

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """What the backbone makes of B images."""

    cls: Tensor
    """[B, D] after the CLS norm"""
    patches: Tensor
    """[B, n, D] after the patch norm, row by row"""
    raw_patches: Tensor
    """[B, n, D] before it"""


class Block(nn.Module):
    """A pre-norm transformer block of timm's parts (and parameter names), which runs only what is wanted.

    Args:
        block: timm's; its stochastic depth is not used.
    """

    attn: Any
    mlp: Any

    def __init__(self, block: timm_vit.Block) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2

    def forward(self, x: Tensor, rows: BlockRows | None = None, *, cls_only: bool = False) -> Tensor:
        """Tokens [B, 1+n, D] → [B, 1+n, D], or [B, 1, D] where only the CLS token is wanted.

        Args:
            x: tokens, CLS first.
            rows: images that pass through each branch; None: all.
            cls_only: for a last block of which nothing else is read: one query, and the MLP of one token.
        """
        attention, mlp, scale = rows if rows is not None else (None, None, 1.0)
        attend = self._attend_from_cls if cls_only else self.attn
        # Norms see all images: what they keep for the backward pass is the residual stream, which is kept anyway.
        branch = self.ls1(attend(_take(self.norm1(x), attention)))
        x = _add(x[:, :1] if cls_only else x, branch, attention, scale)
        branch = self.ls2(self.mlp(_take(self.norm2(x), mlp)))
        return _add(x, branch, mlp, scale)

    def _attend_from_cls(self, x: Tensor) -> Any:
        """`attn(x)[:, :1]`, with one query."""
        attn = self.attn
        dim, heads = attn.attn_dim, (attn.num_heads, attn.head_dim)
        weight, bias = attn.qkv.weight, attn.qkv.bias
        q_bias, kv_bias = (None, None) if bias is None else (bias[:dim], bias[dim:])
        q = F.linear(x[:, :1], weight[:dim], q_bias).unflatten(-1, heads).transpose(1, 2)  # [B, h, 1, D/h]
        kv = F.linear(x, weight[dim:], kv_bias).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)  # [B, h, 1+n, D/h] each
        q, k = attn.q_norm(q), attn.k_norm(k)
        if attn.fused_attn:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            attended = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        attended = attn.norm(attended.transpose(1, 2).flatten(2))  # most models have neither this nor a gate
        if attn.gate is not None:
            attended = attended * attn.gate(x[:, :1]).sigmoid()
        return attn.proj(attended)


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _add(x: Tensor, branch: Tensor, rows: Tensor | None, scale: float) -> Tensor:
    """The residual stream with a branch's output for some of its images, scaled so that its mean is that of all."""
    return x + branch if rows is None else x.index_add(0, rows, branch.to(x.dtype), alpha=scale)


class VisionTransformer(nn.Module):
    """A plain ViT by its timm name, initialised as iBOT does (trunc-normal .02; patch projection as PyTorch's).

    Args:
        config: name, sizes, whether the final norm is shared, how position embeddings are resized, whether blocks are
            run again in the backward pass instead of keeping their activations.
        image_px: side of the images whose patch grid the position embeddings are made for.
        patch_px: side of a patch, which must be the named model's.
        drop_path: stochastic depth of the last block; which images skip what is an argument of `forward`.

    Raises:
        CrispError: a name that timm does not have, one that is no plain ViT, or sizes that do not fit.
    """

    def __init__(self, config: ModelConfig, *, image_px: int, patch_px: int, drop_path: float) -> None:
        super().__init__()
        vit = _create_plain_vit(config, image_px=image_px, patch_px=patch_px)
        self.patch_px = patch_px
        self.recompute = config.recompute
        self.position_resize = config.position_resize
        self.base_grid: tuple[int, int] = vit.patch_embed.grid_size
        self.dim: int = vit.embed_dim
        self.num_heads: int = vit.blocks[0].attn.num_heads

        self.patch_embed = vit.patch_embed
        self.cls_token = vit.cls_token  # [1, 1, D]
        self.pos_embed = vit.pos_embed  # [1, 1+n, D]
        self.blocks = nn.ModuleList(Block(block) for block in vit.blocks)
        self.drop_rates = depth_rates(drop_path, len(self.blocks))
        nn.init.trunc_normal_(self.cls_token, std=0.02)  # timm draws 1e-6
        # two-dimensional, so that weight decay reaches it as it reaches the CLS token and the position embedding
        self.mask_token = nn.Parameter(torch.zeros(1, self.dim))
        self.norm_cls = nn.LayerNorm(self.dim, eps=LAYER_NORM_EPS)
        self.norm_patch = self.norm_cls if config.shared_norm else nn.LayerNorm(self.dim, eps=LAYER_NORM_EPS)

    def forward(
        self, images: Tensor, masks: Tensor | None = None, rows: Sequence[BlockRows | None] | None = None
    ) -> Tokens:
        """All tokens of the last block.

        Args:
            images: [B, 3, H, W], sides divisible by the patch.
            masks: [B, n] bool, True where a patch is replaced by the mask token.
            rows: [depth] images that pass through each block's branches; None: all.
        """
        x = self._embed(images, masks)
        for depth, block in enumerate(self.blocks):
            x = self._run(block, x, rows[depth] if rows else None)
        raw_patches = x[:, 1:]
        return Tokens(cls=self.norm_cls(x[:, 0]), patches=self.norm_patch(raw_patches), raw_patches=raw_patches)

    def forward_cls(self, images: Tensor, rows: Sequence[BlockRows | None] | None = None) -> Tensor:
        """The CLS token alone, [B, 3, H, W] → [B, D]: all that the loss wants of a local view; `rows` as above."""
        x = self._embed(images)
        last = len(self.blocks) - 1
        for depth, block in enumerate(self.blocks):
            x = self._run(block, x, rows[depth] if rows else None, cls_only=depth == last)
        return self.norm_cls(x[:, 0])

    def _run(self, block: nn.Module, x: Tensor, rows: BlockRows | None, *, cls_only: bool = False) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # Nothing in a block is drawn at random: there is no generator's state to put back.
            again: Tensor = checkpoint(block, x, rows, cls_only=cls_only, use_reentrant=False, preserve_rng_state=False)
            return again
        out: Tensor = block(x, rows, cls_only=cls_only)
        return out

    def forward_last_blocks(self, images: Tensor, *, blocks: int, norm: Literal["patch", "raw"] = "patch") -> Tensor:
        """Patch tokens averaged over the last `blocks` blocks (paper, 3.1), [B, 3, H, W] → [B, n, D].

        Args:
            images: [B, 3, H, W], sides divisible by the patch.
            blocks: M, from 1 to the depth.
            norm: take each block's patches through the patch norm, or as they are.
        """
        taken = [
            self.norm_patch(x[:, 1:]) if norm == "patch" else x[:, 1:] for x in self.last_blocks(images, blocks=blocks)
        ]
        return torch.stack(taken).mean(0)

    def last_blocks(self, images: Tensor, *, blocks: int) -> Iterator[Tensor]:
        """All tokens [B, 1+n, D] out of each of the last `blocks` blocks, before any norm, the last block's at the end.

        Args:
            images: [B, 3, H, W], sides divisible by the patch.
            blocks: from 1 to the depth.
        """
        assert 1 <= blocks <= len(self.blocks), f"{blocks} of {len(self.blocks)} blocks"
        x = self._embed(images)
        first = len(self.blocks) - blocks
        for depth, block in enumerate(self.blocks):
            x = block(x)
            if depth >= first:
                yield x

    def _embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] → [B, 1+n, D]; a masked patch keeps its position embedding."""
        height, width = images.shape[-2:]
        assert height % self.patch_px == width % self.patch_px == 0, f"{height}×{width} px"
        patches = self.patch_embed.proj(images.to(self.pos_embed.dtype)).flatten(2).transpose(1, 2)  # [B, n, D]
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token, patches)
        # `len` would make the batch a constant of an exported graph
        cls, position = self.cls_token.expand(images.shape[0], -1, -1), self._positions(height, width)
        return torch.cat([cls, patches], dim=1) + position

    def _positions(self, height_px: int, width_px: int) -> Tensor:
        """Position embeddings [1, 1+n, D] of an image's grid, bicubic from the base grid."""
        grid = (height_px // self.patch_px, width_px // self.patch_px)
        if grid == self.base_grid:
            return self.pos_embed
        base = self.pos_embed[:, 1:].unflatten(1, self.base_grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
        if self.position_resize == "scale":
            # the .1 keeps the floor of base · scale at the grid, and enters the sampling positions too
            scale = ((grid[0] + 0.1) / self.base_grid[0], (grid[1] + 0.1) / self.base_grid[1])
            resized = F.interpolate(base, scale_factor=scale, mode="bicubic")
        else:
            resized = F.interpolate(base, size=grid, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def set_fused_attention(module: nn.Module, fused: bool) -> None:
    """Choose torch's fused attention, or three plain operations, for every block.

    Fused is the right one on CUDA. On the CPU its backward pass in bfloat16 is 2.5 to 6 times slower than the plain
    form's.
    """
    for part in module.modules():
        if isinstance(part, Attention):
            part.fused_attn = fused


def compile_blocks(module: nn.Module) -> None:
    """Have torch.compile compile every block: all are alike, so that it does so once per kind of call."""
    for part in module.modules():
        if isinstance(part, Block):
            part.compile()


def _create_plain_vit(config: ModelConfig, *, image_px: int, patch_px: int) -> Any:
    """timm's model, refused where it has a part that this backbone does not run."""
    plain = f"model.arch={config.arch}: {{}}; name a plain ViT such as vit_small_patch16_224"
    if not timm.is_model(config.arch):
        near = difflib.get_close_matches(config.arch, timm.list_models("vit_*"), n=1)
        hint = f"did you mean {near[0]}?" if near else "see timm.list_models('vit_*')"
        raise CrispError(f"model.arch={config.arch}: timm has no such model; {hint}")
    if timm.models.model_entrypoint(config.arch).__module__ != timm_vit.__name__:
        raise CrispError(plain.format("not a Vision Transformer"))
    try:
        vit = timm.create_model(
            config.arch,
            pretrained=False,
            num_classes=0,
            img_size=image_px,
            **config.arch_args,
        )
    except AssertionError as error:  # timm's checks of sizes against each other
        sizes = ", ".join(f"model.{name}={size}" for name, size in config.arch_args.items())
        raise CrispError(f"{sizes}: {error}; change them") from error
    unwanted = {
        "no CLS token": vit.cls_token is None,
        "register tokens": vit.num_reg_tokens > 0,
        "no learned position embedding of the CLS token": vit.pos_embed is None or vit.no_embed_class,
        "a norm before its blocks": not all(isinstance(n, nn.Identity) for n in (vit.norm_pre, vit.patch_embed.norm)),
        "blocks of another kind": not all(type(b) is timm_vit.Block for b in vit.blocks),
        "attention of another kind": not all(type(b.attn) is Attention for b in vit.blocks),
    }
    for what, present in unwanted.items():
        if present:
            raise CrispError(plain.format(f"it has {what}"))
    if vit.patch_embed.patch_size != (patch_px, patch_px):
        raise CrispError(
            f"views.patch_px={patch_px}: model.arch={config.arch} has patches of {vit.patch_embed.patch_size[0]}; "
            f"change one of the two"
        )
    return vit
