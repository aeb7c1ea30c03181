"""Data2Vec 2.0 (Baevski et al., 2022): a post-norm ViT with fixed positions and a CLS token that has none.

After https://github.com/facebookresearch/fairseq, `examples/data2vec/models` at
3d262bb25690e4eb2e7d3c1309b1e9c406ca4b99. With random weights of ViT-B/16 and of two blocks of ViT-L/16 and H/14, its
features and these differ by at most 4e-6 in float32, and by 2e-14 in float64 (its softmax in float64, too). CAPI's
evaluation loads Data2Vec 2.0 into timm (https://github.com/facebookresearch/capi, `baselines/data2vec2_loader.py`): the
same bits as here, also at 256×256 px.

Patches get their sine and cosine positions, CLS comes first, all go through a norm, and then through blocks that norm
*after* each branch was added. So the last norm is in the last block, and what a block puts out is normed already.

Axes: B images, n patches, N = 1 + n, D width, h heads, d = D / h.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crisp.errors import CrispError
from crisp.models.frozen import BlockTokens, FrozenBackbone
from crisp.models.published.keys import KeyRules, flatten, own_copy, sort_keys
from crisp.models.published.positions import PositionRule, check_last, grid_side, patch_grid, resize_positions
from crisp.models.published.system import Built, System
from crisp.models.published.vit import IMAGENET_MEAN, IMAGENET_STD, check_weights
from crisp.models.published.vit_system import arch_name

NORM_EPS = 1e-6
MLP_RATIO = 4
POSITIONS: PositionRule = "size, antialias"
"""fairseq's code has one grid only; this is how CAPI's evaluation, through timm, makes others"""
HEADS = {768: 12, 1024: 16, 1280: 16}
"""Of a width, in the published configurations; for files that do not hold theirs"""

_IMAGE = r"modality_encoders\.IMAGE\."
_LAYER = r"((?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias))"
_UNLIKE = {
    r"model\.model\..*|.*\.head\.(weight|bias)": "a classifier around it, so it was fine-tuned",
    r".*modality_encoders\.(?!IMAGE\.).*": "a modality other than images",
    r".*\.(alibi_scale|alibi_bias)": "ALiBi positions",
    r"(model\.)?norm\..*": "a norm after its blocks, so they norm first",
}


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
        dim, heads, patch_px: of the network.
        image_blocks: how many blocks of its own the modality has.
        shared_blocks: how many follow.
        side: of the square grid of positions, in patches.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(
        self, *, dim: int, image_blocks: int, shared_blocks: int, heads: int, patch_px: int, side: int
    ) -> None:
        super().__init__()
        self.dim, self.depth = dim, image_blocks + shared_blocks
        self.patch_px, self.native_px = patch_px, patch_px * side
        self.facts = {"heads": heads, "positions": POSITIONS, "eps": NORM_EPS}
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=patch_px, stride=patch_px)
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm_pre = nn.LayerNorm(dim, eps=NORM_EPS)
        self.image_blocks = nn.ModuleList(PostNormBlock(dim, heads) for _ in range(image_blocks))
        self.shared_blocks = nn.ModuleList(PostNormBlock(dim, heads) for _ in range(shared_blocks))

    @property
    def blocks(self) -> list[Any]:
        """All of them, in the order in which they run."""
        return [*self.image_blocks, *self.shared_blocks]

    def tokens(self, images: Tensor) -> Tensor:
        """What the first block is given.

        Args:
            images: [B, 3, H, W] normalised.

        Returns:
            [B, 1 + n, D], CLS first.
        """
        positions = resize_positions(self.pos_embed, patch_grid(images, self.patch_px), POSITIONS)
        patches = self.patch_embed(images.to(positions.dtype)).flatten(2).transpose(1, 2) + positions
        x: Tensor = self.norm_pre(torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1))
        return x

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        """As `FrozenBackbone.forward`; each block's own last norm is the final one."""
        check_last(last, self.depth)
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


def _rules(network: str, other: tuple[str, str]) -> KeyRules:
    """Of files from which one network is taken.

    Args:
        network: pattern of what stands before its keys, without the wrapping `model.`.
        other: pattern of the other network's keys, and why they are ignored.
    """
    start = rf"(?:model\.)?{network}"
    decoders = rf"(?:model\.)?(?:{_IMAGE}decoder|shared_decoder|recon_proj)\..*"
    run = r"args|(?:criterion|optimizer_history|task_state|extra_state|last_optimizer_state|fsdp_metadata)(?:\..*)?"
    return KeyRules(
        weights=(
            (rf"{start}{_IMAGE}extra_tokens", "cls_token"),
            (rf"{start}{_IMAGE}fixed_positional_encoder\.positions", "pos_embed"),
            (rf"{start}{_IMAGE}local_encoder\.proj\.(weight|bias)", r"patch_embed.\1"),
            (rf"{start}{_IMAGE}context_encoder\.norm\.(weight|bias)", r"norm_pre.\1"),
            (rf"{start}{_IMAGE}context_encoder\.blocks\.(\d+)\.{_LAYER}", r"image_blocks.\1.\2"),
            (rf"{start}blocks\.(\d+)\.{_LAYER}", r"shared_blocks.\1.\2"),
        ),
        ignored=(
            (decoders, "of decoders, which only pre-training uses"),
            other,
            (r"cfg", "its configuration, but for the number of heads"),
            (run, "state of its run"),
        ),
    )


class Data2Vec(System):
    """`base_imagenet.pt`, `large_imagenet.pt`, `huge_imagenet.pt`: checkpoints of fairseq, networks in `model`.

    The student is taken, with which fairseq's own fine-tuning starts; the teacher, its moving average, is in
    `model._ema`.
    """

    name = "data2vec2"
    title = "Data2Vec 2.0"
    rules = _rules("", (r"(?:model\.)?_ema\..*", "of the moving average, which data2vec2-ema:FILE takes"))

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """By its modality encoders."""
        return any("modality_encoders." in key for key in flatten(state))

    def build(self, state: Mapping[str, Any], source: str) -> Built:
        """See System."""
        flat = flatten(flatten(state))  # `_ema` is a mapping within `model`
        for pattern, what in _UNLIKE.items():
            for key in flat:
                if re.fullmatch(pattern, key):
                    raise CrispError(f"{source}: it has {what} ({key}); give a pre-trained image model of Data2Vec 2.0")
        keys = sort_keys(flat, self.rules, source=source, system=self.title)
        weights = {name: own_copy(tensor) for name, tensor in keys.tensors.items()}
        for name, axes in (("patch_embed.weight", 4), ("pos_embed", 3), ("shared_blocks.0.norm1.weight", 1)):
            if name not in weights or weights[name].ndim != axes:
                raise CrispError(f"{source}: no whole {self.title} (no {name} of {axes} axes); download it again")
        dim, _, _, patch_px = weights["patch_embed.weight"].shape
        heads, whence = _heads(state, dim, source)
        with torch.device("meta"):
            backbone = Data2VecBackbone(
                dim=dim,
                image_blocks=_count(weights, "image_blocks"),
                shared_blocks=_count(weights, "shared_blocks"),
                heads=heads,
                patch_px=patch_px,
                side=grid_side(weights["pos_embed"].shape[1], source=source),
            )
        check_weights(weights, backbone, source)
        backbone.load_state_dict(weights, assign=True)
        backbone.eval().requires_grad_(False)
        return Built(backbone, arch_name(backbone), keys.account(f"{heads} heads {whence}"))


class Data2VecEma(Data2Vec):
    """The same files; the teacher is taken."""

    name = "data2vec2-ema"
    title = "Data2Vec 2.0 EMA"
    rules = _rules(
        r"_ema\.",
        (r"(?:model\.)?(?!_ema\.)(?:modality_encoders|blocks)\..*", "of the student, which data2vec2:FILE takes"),
    )

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """Never: its files hold both networks, and the student is taken unless this system is named."""
        return False

    def build(self, state: Mapping[str, Any], source: str) -> Built:
        """See System."""
        if not any(re.match(r"(model\.)?_ema\.", key) for key in flatten(flatten(state))):
            raise CrispError(f"{source}: no moving average (_ema) in it; take the student with data2vec2:FILE")
        return super().build(state, source)


def _count(weights: Mapping[str, Tensor], blocks: str) -> int:
    return 1 + max((int(match[1]) for name in weights if (match := re.match(rf"{blocks}\.(\d+)\.", name))), default=-1)


def _heads(state: Mapping[str, Any], dim: int, source: str) -> tuple[int, str]:
    """Number of attention heads, and where it is from."""
    config = state.get("cfg")
    model = config.get("model") if isinstance(config, Mapping) else None
    heads = model.get("num_heads") if isinstance(model, Mapping) else None
    if isinstance(heads, int) and heads > 0 and dim % heads == 0:
        return heads, "as its configuration says"
    if dim not in HEADS:
        raise CrispError(
            f"{source}: the number of attention heads of width {dim} is not known, and the file has no "
            f"cfg.model.num_heads that divides it; give the whole checkpoint"
        )
    return HEADS[dim], "as published for its width"
