import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crisp.config import ModelConfig
from crisp.errors import CrispError
from crisp.models.stochastic_depth import draw_kept, kept_rows
from crisp.models.vit import VisionTransformer, set_fused_attention

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}


def build(*, image_px: int = 64, patch_px: int = 16, drop_path: float = 0.0, **changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    config = ModelConfig(**({"arch": "vit_tiny_patch16_224"} | TINY | changes))
    return VisionTransformer(config, image_px=image_px, patch_px=patch_px, drop_path=drop_path)


def plain_blocks(vit: VisionTransformer, images: Tensor, masks: Tensor) -> list[Tensor]:
    """Tokens after each block on the base grid, spelled out from the weights."""
    patches = F.unfold(images, 16, stride=16).transpose(1, 2)  # [B, n, 3·16·16]
    x = F.linear(patches, vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias)
    x[masks] = vit.mask_token[0]
    x = torch.cat([vit.cls_token.expand(len(x), 1, -1), x], dim=1) + vit.pos_embed
    after = []
    for block in vit.blocks:
        y = F.layer_norm(x, (32,), block.norm1.weight, block.norm1.bias, 1e-6)
        q, k, v = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=-1)
        heads = []
        for h in range(2):
            part = slice(16 * h, 16 * h + 16)
            attention = (q[..., part] @ k[..., part].mT / math.sqrt(16)).softmax(-1)
            heads.append(attention @ v[..., part])
        x = x + F.linear(torch.cat(heads, -1), block.attn.proj.weight, block.attn.proj.bias)
        y = F.layer_norm(x, (32,), block.norm2.weight, block.norm2.bias, 1e-6)
        y = F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias))
        x = x + F.linear(y, block.mlp.fc2.weight, block.mlp.fc2.bias)
        after.append(x)
    return after


@pytest.fixture
def vit() -> VisionTransformer:
    vit = build().double()
    for parameter in vit.parameters():  # zeros and ones would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    return vit.requires_grad_(False)


def test_forward_equals_a_plain_one(vit: VisionTransformer) -> None:
    images, masks = torch.randn(3, 3, 64, 64).double(), torch.rand(3, 16) < 0.4
    last = plain_blocks(vit, images, masks)[-1]
    tokens = vit(images, masks)
    torch.testing.assert_close(tokens.cls, vit.norm_cls(last[:, 0]))
    torch.testing.assert_close(tokens.patches, vit.norm_patch(last[:, 1:]))
    torch.testing.assert_close(tokens.raw_patches, last[:, 1:])
    assert not torch.allclose(vit.norm_cls(last[:, 0]), vit.norm_patch(last[:, 0]))
    torch.testing.assert_close(vit(images, torch.zeros_like(masks)).cls, vit(images).cls)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_last_blocks_are_averaged(vit: VisionTransformer, blocks: int) -> None:
    images = torch.randn(2, 3, 64, 64).double()
    taken = [x[:, 1:] for x in plain_blocks(vit, images, torch.zeros(2, 16, dtype=torch.bool))[-blocks:]]
    raw = vit.forward_last_blocks(images, blocks=blocks, norm="raw")
    torch.testing.assert_close(raw, sum(taken) / blocks)
    normed = vit.forward_last_blocks(images, blocks=blocks, norm="patch")
    torch.testing.assert_close(normed, sum(vit.norm_patch(x) for x in taken) / blocks)


def bicubic_matrix(out: int, base: int, scale: float) -> Tensor:
    """[out, base]: bicubic interpolation along one axis as iBOT's call makes it, with a = −.75 and clamped borders."""

    def kernel(t: float) -> float:
        a, t = -0.75, abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    matrix = np.zeros((out, base))
    for i in range(out):
        source = (i + 0.5) / scale - 0.5
        for j in range(math.floor(source) - 1, math.floor(source) + 3):
            matrix[i, min(max(j, 0), base - 1)] += kernel(source - j)
    return torch.from_numpy(matrix)


@pytest.mark.parametrize("side", [96, 160, 384])
def test_positions_of_another_grid(side: int) -> None:
    grid = side // 16
    for resize, scale in (("scale", (grid + 0.1) / 14), ("size", grid / 14)):
        vit = build(image_px=224, position_resize=resize).double()
        table = vit.pos_embed[0, 1:].reshape(14, 14, 32)
        across = bicubic_matrix(grid, 14, scale)
        want = torch.einsum("ia,jb,abd->ijd", across, across, table).reshape(1, grid * grid, 32)
        got = vit._positions(side, side)
        torch.testing.assert_close(got[:, 1:], want, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(got[:, :1], vit.pos_embed[:, :1])
    scaled = build(image_px=224)._positions(side, side)
    sized = build(image_px=224, position_resize="size")._positions(side, side)
    assert (scaled - sized).abs().max() > 1e-4


def test_a_grid_that_is_not_square(vit: VisionTransformer) -> None:
    assert vit(torch.zeros(1, 3, 32, 96).double()).patches.shape == (1, 12, 32)
    assert vit._positions(64, 64) is vit.pos_embed


def test_shared_norm_is_one_module() -> None:
    shared, apart = build(shared_norm=True), build()
    assert shared.norm_cls is shared.norm_patch
    assert apart.norm_cls is not apart.norm_patch
    assert sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in shared.parameters()) == 2 * 32


def test_initialisation() -> None:
    vit = build(embed_dim=192, depth=2, num_heads=3)  # wide enough for statistics
    for name, module in vit.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, name
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.02), name
            assert module.bias.count_nonzero() == 0, name
    assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.15)
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert vit.mask_token.count_nonzero() == 0
    assert vit.mask_token.ndim == 2  # decayed, as the CLS token is
    bound = 1 / math.sqrt(3 * 16 * 16)  # PyTorch's own for the patch projection
    assert 0.99 * bound < vit.patch_embed.proj.weight.abs().max() <= bound


def test_drop_path_is_linear_in_depth() -> None:
    assert build(drop_path=0.2).drop_rates == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize("fused", [False, True])
def test_a_last_block_for_the_cls_token_alone_is_the_whole_one(fused: bool) -> None:
    vit = build().double()
    set_fused_attention(vit, fused)
    images = torch.randn(3, 3, 64, 64).double()
    cls = vit.forward_cls(images)
    torch.testing.assert_close(cls, vit(images).cls)
    alone = torch.autograd.grad(cls.square().sum(), [*vit.blocks.parameters()])
    whole = torch.autograd.grad(vit(images).cls.square().sum(), [*vit.blocks.parameters()])
    torch.testing.assert_close(alone, whole)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    rates = build(drop_path=0.6).drop_rates
    kept = draw_kept(rates, seed=0, step=3, slots=np.arange(4), views=1)
    gradients = []
    for recompute in (False, True):
        vit = build(drop_path=0.6, recompute=recompute).double()
        rows = kept_rows(kept, rates, device=torch.device("cpu"))
        images = torch.ones(4, 3, 64, 64).double()
        loss = vit(images, None, rows).patches.square().sum() + vit.forward_cls(images, rows).square().sum()
        gradients.append(torch.autograd.grad(loss, [*vit.blocks.parameters()]))
    assert all(map(torch.equal, *gradients))


def test_images_that_skip_a_branch_are_as_if_it_were_not_there(vit: VisionTransformer) -> None:
    """Against timm's form: every branch is run, and its result multiplied by 0 or by 1 / probability."""
    rates = [0.0, 0.3, 0.6]
    kept = draw_kept(rates, seed=1, step=2, slots=np.arange(5), views=2)  # [3, 2, 2, 5]
    assert not kept[1:].all()
    assert kept[0].all()
    images = torch.randn(10, 3, 64, 64).double()
    x = vit._embed(images)
    for depth, block in enumerate(vit.blocks):
        share = torch.from_numpy(kept[depth].reshape(2, 10)) / (1 - rates[depth])
        x = x + share[0, :, None, None] * block.attn(block.norm1(x))
        x = x + share[1, :, None, None] * block.mlp(block.norm2(x))
    rows = kept_rows(kept, rates, device=torch.device("cpu"))
    assert rows[0] is None
    torch.testing.assert_close(vit(images, None, rows).raw_patches, x[:, 1:])
    torch.testing.assert_close(vit.forward_cls(images, rows), vit.norm_cls(x[:, 0]))


def test_both_attentions_agree(vit: VisionTransformer) -> None:
    images = torch.randn(2, 3, 64, 64).double()
    set_fused_attention(vit, True)
    fused = vit(images).patches
    set_fused_attention(vit, False)
    assert not any(b.attn.fused_attn for b in vit.blocks)
    torch.testing.assert_close(vit(images).patches, fused)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_images_of_any_float_type(dtype: torch.dtype) -> None:
    vit = build()
    assert vit(torch.zeros(1, 3, 64, 64, dtype=dtype)).cls.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert vit(torch.randn(1, 3, 64, 64).to(dtype)).cls.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "vit_smal_patch16_224"}, "did you mean vit_small_patch16_224"),
        ({"arch": "nothing like it"}, "timm has no such model"),
        ({"arch": "resnet18"}, "not a Vision Transformer"),
        ({"arch": "vit_small_patch16_dinov3"}, "not a Vision Transformer"),
        ({"arch": "vit_base_patch16_clip_224"}, "a norm before its blocks"),
        ({"arch": "vit_base_patch16_siglip_224"}, "no CLS token"),
        ({"arch": "vit_small_patch14_reg4_dinov2"}, "register tokens"),
        ({"patch_px": 8}, r"views\.patch_px=8: .* has patches of 16"),
        ({"num_heads": 3}, r"model\.embed_dim=32, .*model\.num_heads=3: .*divisible"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CrispError, match=message) as error:
        build(**changes)
    assert "\n" not in str(error.value)
