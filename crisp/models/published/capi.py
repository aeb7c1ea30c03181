"""CAPI (Darcet et al., 2025): a pre-norm ViT without CLS token, with registers and rotary positions.

After https://github.com/facebookresearch/capi, `model.py` at 98b4fa17ee8eec8810c17022df9a27a44845368b; with random
weights of ViT-L/14 both give the same bits (float32 at 224×224 px; four blocks also in float64 and at 140×224).

Positions are in the attention alone: it mixes pairs of channels of queries and keys by angles that are linear in (row,
column), both from 0 to 1 over the image, so that any grid fits. Registers come first and lie on the image's edge, as in
all published models (a file does not say). The final norm has no weights. What CAPI's own classification takes for a
global representation is the mean of its decoder's output; that is no token, and not made here.

Axes: B images, r registers, n patches, N = r + n, D width, h heads, d = D / h.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crisp.errors import CrispError
from crisp.models.frozen import BlockTokens, FrozenBackbone
from crisp.models.published.keys import KeyRules, own_copy, sort_keys
from crisp.models.published.positions import check_last, patch_grid
from crisp.models.published.system import Built, System
from crisp.models.published.vit import IMAGENET_MEAN, IMAGENET_STD, check_weights
from crisp.models.published.vit_system import arch_name

NORM_EPS = 1e-5
MLP_RATIO = 4

_BLOCK = r"(?:backbone\.)?encoder\.blocks\.(\d+)\."
_KEYS = KeyRules(
    weights=(
        (r"(?:backbone\.)?(registers|patch_embed\.(?:weight|bias))", r"\1"),
        (rf"{_BLOCK}residual([12])\.norm\.weight", r"blocks.\1.norm\2.weight"),
        (rf"{_BLOCK}residual1\.fn\.rope\.freqs", r"blocks.\1.attn.freqs"),
        (rf"{_BLOCK}residual1\.fn\.((?:[qkv]_)?proj\.weight)", r"blocks.\1.attn.\2"),
        (rf"{_BLOCK}residual2\.fn\.(fc[12]\.weight)", r"blocks.\1.mlp.\2"),
    ),
    ignored=(
        (r"(?:backbone\.)?decoder\..*", "of the decoder, which predicts clusters in pre-training"),
        (r"(?:backbone\.)?mask_token", "of the decoder's input"),
        (r"head\.last_layer\.weight_[gv]", "of the cluster head"),
    ),
)


def patch_coordinates(rows: int, columns: int, *, like: Tensor) -> Tensor:
    """(row, column) of each patch, from 0 at the first to 1 at the last.

    Args:
        rows, columns: of the grid; where there is one, its coordinate is 0.
        like: whose dtype and device the result has.

    Returns:
        [n, 2], row by row.
    """
    row = torch.linspace(0, 1, rows, dtype=like.dtype, device=like.device)
    column = torch.linspace(0, 1, columns, dtype=like.dtype, device=like.device)
    return torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).flatten(0, 1)


def register_coordinates(count: int, patches: Tensor) -> Tensor:
    """(row, column) of the registers: evenly along the edge of the patches' rectangle, once around from its first.

    Args:
        count: r, a multiple of 4.
        patches: [n, 2].

    Returns:
        [r, 2].
    """
    along = torch.arange(count // 4, dtype=patches.dtype, device=patches.device) / (count // 4)
    start, end = torch.zeros_like(along), torch.ones_like(along)
    sides = [(along, start), (end, along), (1 - along, end), (start, 1 - along)]
    unit = torch.cat([torch.stack(side, dim=-1) for side in sides])
    first, last = patches.amin(dim=0), patches.amax(dim=0)
    return first + unit * (last - first)


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Mix the pairs (x[j], x[j + d/2]) by their angles.

    In CAPI's files the first of a pair has the angle of its row and the second that of its column, so that this is no
    rotation, unless the two are equal. Its weights were trained with that.

    Args:
        x: [B, h, N, d].
        angle: [N, d] in radians.

    Returns:
        [B, h, N, d].
    """
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()


class CapiAttention(nn.Module):
    """Self-attention without biases. `freqs` [2, d], constants of the file, are angles per unit of (row, column)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.freqs = nn.Parameter(torch.zeros(2, dim // heads))

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """Tokens [B, N, D] at coordinates [N, 2] → [B, N, D]."""
        # Products and a sum, no matrix product: autocast leaves these angles, of up to 44 radians, in float32.
        angle = coordinates[:, :1] * self.freqs[0] + coordinates[:, 1:] * self.freqs[1]  # [N, d]
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, h, N, d]
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = turn(query, angle).to(value.dtype), turn(key, angle).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class CapiMlp(nn.Module):
    """Two layers without biases."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim, bias=False)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class CapiBlock(nn.Module):
    """Attention, then an MLP, each after an RMSNorm and added to its input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=NORM_EPS)
        self.attn = CapiAttention(dim, heads)
        self.norm2 = nn.RMSNorm(dim, eps=NORM_EPS)
        self.mlp = CapiMlp(dim)

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """Tokens [B, N, D] at coordinates [N, 2] → [B, N, D]."""
        x = x + self.attn(self.norm1(x), coordinates)
        return x + self.mlp(self.norm2(x))


class CapiBackbone(FrozenBackbone):
    """CAPI's encoder. Its decoder, which only predicts clusters in pre-training, is not part of it.

    Args:
        dim, depth, heads, patch_px: of the network.
        registers: how many, a multiple of 4.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    native_px = 224
    """What it was trained at; its positions fit any grid"""

    def __init__(self, *, dim: int, depth: int, heads: int, patch_px: int, registers: int) -> None:
        super().__init__()
        self.dim, self.depth, self.patch_px = dim, depth, patch_px
        self.facts = {"heads": heads, "positions": "rotary", "eps": NORM_EPS}
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=patch_px, stride=patch_px)
        self.registers = nn.Parameter(torch.zeros(1, registers, dim))
        self.blocks = nn.ModuleList(CapiBlock(dim, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS, elementwise_affine=False)

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        """As `FrozenBackbone.forward`; there is no CLS token, and registers are left out."""
        check_last(last, self.depth)
        rows, columns = patch_grid(images, self.patch_px)
        embedded = self.patch_embed(images.to(self.registers.dtype)).flatten(2).transpose(1, 2)  # [B, n, D]
        # in the weights' type, also under autocast: in bfloat16 an angle would be off by .1 radians
        patches = patch_coordinates(rows, columns, like=self.registers)
        registers = self.registers.shape[1]
        coordinates = torch.cat([register_coordinates(registers, patches), patches])
        x = torch.cat([self.registers.expand(len(images), -1, -1), embedded], dim=1)
        outputs: list[BlockTokens] = []
        for index, block in enumerate(self.blocks):
            x = block(x, coordinates)
            if index >= self.depth - last:
                outputs.append(BlockTokens(cls=None, patches=self.norm(x)[:, registers:]))
        return outputs


class Capi(System):
    """`capi_vitl14_*.pth`: encoder and decoder under `backbone.`, a cluster head under `head.`; or the former alone."""

    name = "capi"
    title = "CAPI"

    def recognise(self, state: Mapping[str, Any]) -> bool:
        """By the residual branches of its encoder."""
        return any(re.fullmatch(rf"{_BLOCK}residual1\..*", key) for key in state)

    def build(self, state: Mapping[str, Any], source: str) -> Built:
        """See System."""
        keys = sort_keys(state, _KEYS, source=source, system=self.title)
        weights = {name: own_copy(tensor) for name, tensor in keys.tensors.items()}
        for name, axes in (("patch_embed.weight", 4), ("registers", 3), ("blocks.0.attn.freqs", 2)):
            if name not in weights or weights[name].ndim != axes:
                raise CrispError(f"{source}: no whole encoder of CAPI (no {name} of {axes} axes); download it again")
        dim, _, _, patch_px = weights["patch_embed.weight"].shape
        registers = weights["registers"].shape[1]
        if registers % 4:
            raise CrispError(f"{source}: {registers} registers cannot lie on four edges; CAPI has a multiple of 4")
        with torch.device("meta"):
            backbone = CapiBackbone(
                dim=dim,
                depth=1 + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))),
                heads=max(1, dim // weights["blocks.0.attn.freqs"].shape[1]),
                patch_px=patch_px,
                registers=registers,
            )
        check_weights(weights, backbone, source)
        backbone.load_state_dict(weights, assign=True)
        backbone.eval().requires_grad_(False)
        return Built(backbone, arch_name(backbone), keys.account("rotary positions fit any grid"))
