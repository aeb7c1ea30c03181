"""Files under the keys of Data2Vec 2.0's published code against a network that is written plainly from that code.

Keys and shapes: https://github.com/facebookresearch/fairseq at 3d262bb25690e4eb2e7d3c1309b1e9c406ca4b99.
`examples/data2vec/models/data2vec2.py` and `models/modalities/{base,images,modules}.py` have the modules,
`config/v2/{base_images_only,large_images_only,huge_images14_only}_task.yaml` their sizes, `fairseq/trainer.py`
(state_dict) what stands beside `model`. `_ema` holds what `make_target_model` leaves of a copy: all but the decoder.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from crisp.errors import CrispError
from crisp.models.published.data2vec import Data2Vec, Data2VecBackbone, Data2VecEma
from crisp.models.published.load import load_frozen
from crisp.models.published.registry import SYSTEMS
from crisp.models.weights_file import read_weights

IMAGE = "modality_encoders.IMAGE"
DIM, HEADS, PATCH_PX, SIDE = 48, 3, 4, 4
IMAGE_BLOCKS, SHARED_BLOCKS = 1, 2


def published_shapes(
    *, dim: int, image_blocks: int, shared_blocks: int, patch_px: int, side: int, decoder: tuple[int, int, int]
) -> dict[str, tuple[int, ...]]:
    """Keys of the student without `model.`; `decoder`: its width, kernel and number of layers, of 16 groups."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{IMAGE}.extra_tokens": (1, 1, dim),
        f"{IMAGE}.local_encoder.proj.weight": (dim, 3, patch_px, patch_px),
        f"{IMAGE}.local_encoder.proj.bias": (dim,),
        f"{IMAGE}.fixed_positional_encoder.positions": (1, side * side, dim),
        f"{IMAGE}.context_encoder.norm.weight": (dim,),
        f"{IMAGE}.context_encoder.norm.bias": (dim,),
    }
    for start, blocks in ((f"{IMAGE}.context_encoder.blocks", image_blocks), ("blocks", shared_blocks)):
        for i in range(blocks):
            layers = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
            layers |= {"norm2": (dim,), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
            for layer, shape in layers.items():
                shapes[f"{start}.{i}.{layer}.weight"] = shape
                shapes[f"{start}.{i}.{layer}.bias"] = shape[:1]
    width, kernel, layers_of_decoder = decoder
    for i in range(layers_of_decoder):
        per_group = (dim if i == 0 else width) // 16
        shapes[f"{IMAGE}.decoder.blocks.{i}.0.weight"] = (width, per_group, kernel, kernel)
        shapes[f"{IMAGE}.decoder.blocks.{i}.0.bias"] = (width,)
    shapes[f"{IMAGE}.decoder.proj.weight"] = (dim, width)
    shapes[f"{IMAGE}.decoder.proj.bias"] = (dim,)
    return shapes


def checkpoint(student: dict[str, Tensor], teacher: dict[str, Tensor], heads: int) -> dict[str, Any]:
    return {
        "args": None,
        "cfg": {"_name": None, "model": {"_name": "data2vec_multi", "num_heads": heads, "norm_eps": 1e-6}},
        "model": {**student, "_ema": teacher},
        "criterion": None,
        "optimizer_history": [{"criterion_name": "ModelCriterion", "num_updates": 375300}],
        "task_state": {},
        "extra_state": {"metrics": {}, "previous_training_time": 1.0},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []},
    }


@pytest.fixture
def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = published_shapes(
        dim=DIM,
        image_blocks=IMAGE_BLOCKS,
        shared_blocks=SHARED_BLOCKS,
        patch_px=PATCH_PX,
        side=SIDE,
        decoder=(32, 3, 2),
    )

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.15 + ("norm" in name and name.endswith("weight"))

    student = {name: draw(name, shape) for name, shape in shapes.items()}
    teacher = {name: draw(name, shape) for name, shape in shapes.items() if ".decoder." not in name}
    return checkpoint(student, teacher, HEADS)


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def plain_run(network: dict[str, Tensor], images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens [B, 1+n, D] of every block, CLS first, and its attentions [B, h, 1+n, 1+n]; one head at a time."""
    weights = {name: tensor.double() for name, tensor in network.items()}
    rows, columns = images.shape[2] // PATCH_PX, images.shape[3] // PATCH_PX
    patches = [
        images[:, :, r * PATCH_PX : (r + 1) * PATCH_PX, c * PATCH_PX : (c + 1) * PATCH_PX].flatten(1)
        for r in range(rows)
        for c in range(columns)
    ]
    kernel, bias = weights[f"{IMAGE}.local_encoder.proj.weight"], weights[f"{IMAGE}.local_encoder.proj.bias"]
    embedded = torch.stack(patches, dim=1) @ kernel.flatten(1).T + bias
    embedded = embedded + weights[f"{IMAGE}.fixed_positional_encoder.positions"]
    x = torch.cat([weights[f"{IMAGE}.extra_tokens"].expand(len(images), -1, -1), embedded], dim=1)
    x = layer_norm(x, weights, f"{IMAGE}.context_encoder.norm")
    names = [f"{IMAGE}.context_encoder.blocks.{i}" for i in range(IMAGE_BLOCKS)]
    names += [f"blocks.{i}" for i in range(SHARED_BLOCKS)]
    tokens, attentions = [], []
    for block in names:
        heads, shares = [], []
        size = DIM // HEADS
        for h in range(HEADS):
            query, key, value = (
                x @ weights[f"{block}.attn.qkv.weight"][part * DIM + h * size : part * DIM + (h + 1) * size].T
                + weights[f"{block}.attn.qkv.bias"][part * DIM + h * size : part * DIM + (h + 1) * size]
                for part in range(3)
            )
            shares.append((query @ key.transpose(1, 2) / math.sqrt(size)).softmax(dim=-1))
            heads.append(shares[-1] @ value)
        mixed = torch.cat(heads, dim=-1) @ weights[f"{block}.attn.proj.weight"].T + weights[f"{block}.attn.proj.bias"]
        x = layer_norm(x + mixed, weights, f"{block}.norm1")
        hidden = F.gelu(x @ weights[f"{block}.mlp.fc1.weight"].T + weights[f"{block}.mlp.fc1.bias"])
        x = x + hidden @ weights[f"{block}.mlp.fc2.weight"].T + weights[f"{block}.mlp.fc2.bias"]
        x = layer_norm(x, weights, f"{block}.norm2")
        tokens.append(x)
        attentions.append(torch.stack(shares, dim=1))
    return tokens, attentions


def student_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state["model"].items() if name != "_ema"}


@pytest.mark.parametrize("system", ["data2vec2", "data2vec2-ema"])
def test_features_and_attention_are_those_of_the_plain_network(state: dict[str, Any], system: str) -> None:
    network = student_of(state) if system == "data2vec2" else state["model"]["_ema"]
    inputs = images(SIDE * PATCH_PX, SIDE * PATCH_PX)
    backbone = SYSTEMS[system].build(state, "base_imagenet.pt").backbone.double()

    outputs = backbone(inputs, last=3)

    tokens, attentions = plain_run(network, inputs)
    for output, plain in zip(outputs, tokens, strict=True):
        assert output.cls is not None
        torch.testing.assert_close(output.cls, plain[:, 0], rtol=0, atol=1e-12)
        torch.testing.assert_close(output.patches, plain[:, 1:], rtol=0, atol=1e-12)
    torch.testing.assert_close(backbone.cls_attention(inputs), attentions[-1][:, :, 0, 1:], rtol=0, atol=1e-12)


def test_other_grids_get_positions_as_timm_makes_them(state: dict[str, Any]) -> None:
    """CAPI's evaluation of Data2Vec 2.0 (`baselines/data2vec2_loader.py`) leaves them to timm."""
    backbone = Data2Vec().build(state, "base_imagenet.pt").backbone
    assert isinstance(backbone, Data2VecBackbone)
    for rows, columns in ((6, 5), (2, 3)):
        inputs = images(rows * PATCH_PX, columns * PATCH_PX).float()
        positions = resample_abs_pos_embed(backbone.pos_embed, [rows, columns], num_prefix_tokens=0)
        patches = backbone.patch_embed(inputs).flatten(2).transpose(1, 2) + positions
        expected = backbone.norm_pre(torch.cat([backbone.cls_token.expand(2, -1, -1), patches], dim=1))
        torch.testing.assert_close(backbone.tokens(inputs), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("system", ["data2vec2", "data2vec2-ema"])
def test_file_is_accounted_for_key_by_key(state: dict[str, Any], system: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "base_imagenet.pt")
    content = read_weights(str(tmp_path / "base_imagenet.pt"))
    assert [name for name, loader in SYSTEMS.items() if loader.recognise(content)] == ["data2vec2"]

    model = load_frozen(f"{system}:{tmp_path / 'base_imagenet.pt'}", device=torch.device("cpu"))

    backbones = len(state["model"]["_ema"])
    other = "moving average, which data2vec2-ema" if system == "data2vec2" else "student, which data2vec2"
    assert len(model.backbone.state_dict()) == backbones
    assert f"{backbones} tensors loaded, 3 heads as its configuration says" in model.account
    assert f"{backbones} of the {other}:FILE takes" in model.account
    assert "6 of decoders" in model.account  # two layers and a projection, weight and bias
    assert "1 its configuration" in model.account
    assert "6 state of its run" in model.account
    assert model.name == SYSTEMS[system].title + " ViT-48×3/4"
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert not model.backbone.training


@pytest.mark.parametrize(
    ("name", "dim", "image_blocks", "shared_blocks", "heads", "patch_px", "decoder"),
    [
        ("ViT-B/16", 768, 2, 10, 12, 16, (768, 3, 6)),
        ("ViT-B/16", 768, 0, 12, 12, 16, (768, 3, 6)),  # what CAPI's loader expects the published file to have
        ("ViT-L/16", 1024, 0, 24, 16, 16, (1024, 5, 3)),
        ("ViT-H/14", 1280, 0, 32, 16, 14, (1024, 5, 3)),
    ],
)
def test_published_sizes_are_read_from_shapes(
    name: str, dim: int, image_blocks: int, shared_blocks: int, heads: int, patch_px: int, decoder: tuple[int, int, int]
) -> None:
    shapes = published_shapes(
        dim=dim,
        image_blocks=image_blocks,
        shared_blocks=shared_blocks,
        patch_px=patch_px,
        side=224 // patch_px,
        decoder=decoder,
    )
    state = {"model": {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}}

    built = Data2Vec().build(state, "imagenet.pt")

    assert built.arch_name == name
    assert built.backbone.depth == image_blocks + shared_blocks
    assert (built.backbone.dim, built.backbone.patch_px, built.backbone.native_px) == (dim, patch_px, 224)
    assert built.backbone.facts["heads"] == heads
    assert f"{heads} heads as published for its width" in built.account


def test_state_dict_alone_is_read_too(state: dict[str, Any]) -> None:
    inputs = images(16, 16).float()
    bare = student_of(state)
    with pytest.raises(CrispError, match="attention heads of width 48 is not known"):
        Data2Vec().build(bare, "bare.pt")

    (with_config,) = Data2Vec().build({**bare, "cfg": state["cfg"]}, "bare.pt").backbone(inputs)
    (whole,) = Data2Vec().build(state, "whole.pt").backbone(inputs)
    torch.testing.assert_close(with_config.patches, whole.patches, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{IMAGE}.alibi_scale": torch.ones(1)}, "ALiBi positions .model.modality_encoders.IMAGE.alibi_scale"),
        ({"modality_encoders.AUDIO.alibi_scale": torch.ones(1)}, "a modality other than images"),
        ({"norm.weight": torch.ones(DIM)}, "they norm first"),
        ({"model.blocks.0.norm1.weight": torch.ones(DIM)}, "it was fine-tuned"),
        ({"head.weight": torch.ones(10, DIM)}, "it was fine-tuned"),
        ({f"{IMAGE}.local_encoder.1.weight": torch.ones(DIM)}, "1 keys have no known meaning"),
        ({f"{IMAGE}.fixed_positional_encoder.positions": None}, "no whole Data2Vec 2.0 .no pos_embed of 3 axes"),
        ({f"{IMAGE}.fixed_positional_encoder.positions": torch.zeros(1, 15, DIM)}, "make no square"),
        ({"blocks.1.mlp.fc2.bias": None}, r"lacks 1 tensors \(shared_blocks.1.mlp.fc2.bias\)"),
        ({"blocks.1.attn.proj.weight": torch.zeros(DIM, 8)}, "shared_blocks.1.attn.proj.weight is 48×8"),
        ({f"{IMAGE}.extra_tokens": torch.full((1, 1, DIM), torch.inf)}, "cls_token holds NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_named(state: dict[str, Any], changes: dict[str, Tensor | None], message: str) -> None:
    state["model"] = {key: value for key, value in {**state["model"], **changes}.items() if value is not None}
    with pytest.raises(CrispError, match=message):
        Data2Vec().build(state, "base_imagenet.pt")


def test_moving_average_is_missed(state: dict[str, Any]) -> None:
    del state["model"]["_ema"]
    with pytest.raises(CrispError, match="no moving average"):
        Data2VecEma().build(state, "base_imagenet.pt")
