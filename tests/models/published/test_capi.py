"""Files under the keys of CAPI's published code against a network that is written plainly from that code.

Keys and shapes: https://github.com/facebookresearch/capi at 98b4fa17ee8eec8810c17022df9a27a44845368b. `model.py`
(EncoderDecoder, L2NormLinear) has the modules, `default_pretrain_config.yaml` their sizes, and `train_capi.py` writes
`student_ema.state_dict()`, so `backbone.*` and `head.*`.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from crisp.errors import CrispError
from crisp.models.frozen import FrozenBackbone
from crisp.models.published import capi
from crisp.models.published.capi import Capi, register_coordinates, turn
from crisp.models.published.load import load_frozen
from crisp.models.published.registry import SYSTEMS
from crisp.models.weights_file import read_weights

DIM, HEADS, DEPTH, REGISTERS, PATCH_PX = 32, 2, 3, 8, 14


def published_shapes(
    dim: int, heads: int, depth: int, decoder_depth: int, registers: int, patch_px: int, clusters: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.mask_token": (1, dim),
        "backbone.registers": (1, registers, dim),
        "backbone.patch_embed.weight": (dim, 3, patch_px, patch_px),
        "backbone.patch_embed.bias": (dim,),
        "head.last_layer.weight_g": (clusters, 1),
        "head.last_layer.weight_v": (clusters, dim),
    }
    for part, blocks in (("encoder", depth), ("decoder", decoder_depth)):
        for i in range(blocks):
            block = f"backbone.{part}.blocks.{i}"
            shapes |= {
                f"{block}.residual1.fn.{name}.weight": (dim, dim) for name in ["q_proj", "k_proj", "v_proj", "proj"]
            }
            shapes |= {
                f"{block}.residual1.norm.weight": (dim,),
                f"{block}.residual1.fn.rope.freqs": (2, dim // heads),
                f"{block}.residual2.norm.weight": (dim,),
                f"{block}.residual2.fn.fc1.weight": (4 * dim, dim),
                f"{block}.residual2.fn.fc2.weight": (dim, 4 * dim),
            }
    return shapes


def published_freqs(width: int) -> Tensor:
    """[2, width]: frequencies fall from 7 to 7e-4 per image, half of the channels for rows, half for columns."""
    fall = 7 * torch.tensor([(7e-4 / 7) ** (i / (width // 4 - 1)) for i in range(width // 4)])
    pairs, none = torch.cat([fall, fall]), torch.zeros(width // 2)
    return 2 * math.pi * torch.stack([torch.cat([pairs, none]), torch.cat([none, pairs])])


@pytest.fixture
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = published_shapes(DIM, HEADS, DEPTH, 2, REGISTERS, PATCH_PX, 24)
    tensors = {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}
    for name in tensors:
        if name.endswith("freqs"):
            tensors[name] = published_freqs(DIM // HEADS)
        elif name.endswith("norm.weight"):
            tensors[name] += 1
    return tensors


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rms_norm(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight


def place(index: int, rows: int, columns: int) -> tuple[float, float]:
    """(row, column) of token `index`, registers first; grids of more than one row and column."""
    if index >= REGISTERS:
        row, column = divmod(index - REGISTERS, columns)
        return row / (rows - 1), column / (columns - 1)
    edge, along = divmod(index, REGISTERS // 4)
    t = along / (REGISTERS // 4)
    return ((t, 0.0), (1.0, t), (1 - t, 1.0), (0.0, 1 - t))[edge]


def turned(x: Tensor, places: Tensor, freqs: Tensor) -> Tensor:
    """[B, N, d]: channel j of the lower half meets j + d/2, each with the angle of its own frequency."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for j in range(half):
        first, second = x[..., j], x[..., j + half]
        by_row, by_column = places @ freqs[:, j], places @ freqs[:, j + half]
        out[..., j] = first * by_row.cos() - second * by_row.sin()
        out[..., j + half] = second * by_column.cos() + first * by_column.sin()
    return out


def plain_features(state: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """[B, n, D] of every block, one head and one channel at a time where positions enter."""
    weights = {name.removeprefix("backbone."): tensor.double() for name, tensor in state.items()}
    rows, columns = images.shape[2] // PATCH_PX, images.shape[3] // PATCH_PX
    patches = [
        images[:, :, r * PATCH_PX : (r + 1) * PATCH_PX, c * PATCH_PX : (c + 1) * PATCH_PX].flatten(1)
        for r in range(rows)
        for c in range(columns)
    ]
    embedded = torch.stack(patches, dim=1) @ weights["patch_embed.weight"].flatten(1).T + weights["patch_embed.bias"]
    x = torch.cat([weights["registers"].expand(len(images), -1, -1), embedded], dim=1)
    places = torch.tensor([place(i, rows, columns) for i in range(x.shape[1])], dtype=torch.float64)
    outputs = []
    for i in range(DEPTH):
        attention, mlp = f"encoder.blocks.{i}.residual1", f"encoder.blocks.{i}.residual2"
        normed = rms_norm(x, weights[f"{attention}.norm.weight"])
        width = DIM // HEADS
        freqs = weights[f"{attention}.fn.rope.freqs"]
        heads = []
        for h in range(HEADS):
            query, key, value = (
                normed @ weights[f"{attention}.fn.{name}.weight"][h * width : (h + 1) * width].T
                for name in ("q_proj", "k_proj", "v_proj")
            )
            query, key = turned(query, places, freqs), turned(key, places, freqs)
            logits = query @ key.transpose(1, 2) / math.sqrt(width)
            heads.append(logits.softmax(dim=-1) @ value)
        x = x + torch.cat(heads, dim=-1) @ weights[f"{attention}.fn.proj.weight"].T
        hidden = rms_norm(x, weights[f"{mlp}.norm.weight"]) @ weights[f"{mlp}.fn.fc1.weight"].T
        x = x + F.gelu(hidden) @ weights[f"{mlp}.fn.fc2.weight"].T
        outputs.append(rms_norm(x)[:, REGISTERS:])
    return outputs


def build(state: dict[str, Tensor]) -> FrozenBackbone:
    return Capi().build(state, "capi.pth").backbone


def test_features_are_those_of_the_plain_network(state: dict[str, Tensor]) -> None:
    inputs = images(5 * PATCH_PX, 3 * PATCH_PX)

    outputs = build(state).double()(inputs, last=2)

    assert [output.cls for output in outputs] == [None, None]
    for output, plain in zip(outputs, plain_features(state, inputs)[-2:], strict=True):
        torch.testing.assert_close(output.patches, plain, rtol=0, atol=1e-12)


def test_one_row_of_patches_has_all_registers_in_that_row() -> None:
    patches = torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.0, 1.0]])

    places = register_coordinates(8, patches)

    assert places.tolist() == [[0, c] for c in (0, 0, 0, 0.5, 1, 1, 1, 0.5)]


def test_autocast_leaves_the_angles_exact(state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    angles: list[Tensor] = []

    def watched(x: Tensor, angle: Tensor) -> Tensor:
        angles.append(angle)
        return turn(x, angle)

    monkeypatch.setattr(capi, "turn", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        build(state)(images(4 * PATCH_PX, 4 * PATCH_PX).float())

    places = torch.tensor([place(i, 4, 4) for i in range(REGISTERS + 16)], dtype=torch.float64)
    exact = places @ published_freqs(DIM // HEADS).double()
    assert exact.max() > 40  # radians, of which bfloat16 has the next at a distance of a quarter
    for angle in angles:
        torch.testing.assert_close(angle.double(), exact, rtol=0, atol=1e-5)


def test_file_is_accounted_for_key_by_key(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "capi.pth")
    content = read_weights(str(tmp_path / "capi.pth"))
    assert [name for name, system in SYSTEMS.items() if system.recognise(content)] == ["capi"]

    model = load_frozen(str(tmp_path / "capi.pth"), device=torch.device("cpu"))

    kept = [key for key in state if key.startswith("backbone.") and "decoder" not in key and "mask" not in key]
    assert len(kept) == len(model.backbone.state_dict())
    assert f"{len(kept)} tensors loaded" in model.account
    assert "18 of the decoder, which" in model.account
    assert "1 of the decoder's input" in model.account
    assert "2 of the cluster head" in model.account
    assert model.name == "CAPI ViT-32×3/14"
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert not model.backbone.training


def test_published_size_is_read_from_shapes() -> None:
    shapes = published_shapes(1024, 16, 24, 12, 16, 14, 16384)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    built = Capi().build(state, "capi_vitl14_p205.pth")

    assert built.arch_name == "ViT-L/14"
    assert (built.backbone.dim, built.backbone.depth, built.backbone.patch_px) == (1024, 24, 14)
    assert built.backbone.facts["heads"] == 16
    parameters = sum(parameter.numel() for parameter in built.backbone.parameters())
    assert round(parameters / 1e6) == 303  # the README's 302M, and half a million for the patches


def test_backbone_alone_is_read_too(state: dict[str, Tensor]) -> None:
    bare = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    inputs = images(28, 28).float()

    assert Capi().recognise(bare)
    torch.testing.assert_close(build(bare)(inputs)[0].patches, build(state)(inputs)[0].patches, rtol=0, atol=0)


def test_no_cls_token_no_attention_of_it(state: dict[str, Tensor]) -> None:
    with pytest.raises(CrispError, match="this model has no CLS token"):
        build(state).cls_attention(images(28, 28))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.registers": None}, "no whole encoder of CAPI .no registers of 3 axes"),
        ({"backbone.registers": torch.zeros(1, 6, DIM)}, "6 registers cannot lie on four edges"),
        ({"backbone.encoder.blocks.1.residual2.fn.fc2.weight": None}, r"lacks 1 tensors \(blocks.1.mlp.fc2.weight\)"),
        ({"backbone.encoder.blocks.1.residual1.fn.rope.freqs": torch.zeros(2, 8)}, "blocks.1.attn.freqs is 2×8"),
        ({"backbone.encoder.blocks.0.residual1.fn.rope.freqs": torch.zeros(2, 64)}, "blocks.0.attn.freqs is 2×64"),
        ({"backbone.encoder.blocks.0.ls1.gamma": torch.ones(DIM)}, "1 keys have no known meaning"),
        ({"backbone.patch_embed.bias": torch.full((DIM,), torch.nan)}, "patch_embed.bias holds NaN"),
    ],
)
def test_what_does_not_fit_is_named(state: dict[str, Tensor], changes: dict[str, Tensor | None], message: str) -> None:
    changed = {key: value for key, value in {**state, **changes}.items() if value is not None}
    with pytest.raises(CrispError, match=message):
        build(changed)


@pytest.mark.parametrize(("size", "last", "message"), [((28, 30), 1, "multiples"), ((28, 28), 4, "the model has 3")])
def test_what_cannot_be_asked_for_is_named(
    state: dict[str, Tensor], size: tuple[int, int], last: int, message: str
) -> None:
    with pytest.raises(CrispError, match=message):
        build(state)(images(*size), last=last)
