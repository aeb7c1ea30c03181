"""DINOv2's and Web-DINO's layouts of Hugging Face, and a file of Web-DINO's greatest width."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from crisp.errors import CrispError
from crisp.models.published import load_frozen
from tests.models.published import layouts

CPU = torch.device("cpu")


def ported(folder: Path, *, registers: bool, gated: bool, **save: Any) -> Any:
    """transformers' own model, saved by itself in the names of the hub."""
    sizes = {
        "hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 70, "patch_size": 14,
        "use_swiglu_ffn": gated, "attn_implementation": "eager",
    }  # fmt: skip
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=4))
    else:
        model = Dinov2Model(Dinov2Config(**sizes))
    drawn = layouts.filled({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    model.load_state_dict(drawn)
    model.eval().requires_grad_(False).save_pretrained(folder, **save)
    return model


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_hugging_faces_port(tmp_path: Path, registers: bool, gated: bool) -> None:
    model = ported(tmp_path, registers=registers, gated=gated)
    own = layouts.dinov2(192, 3, 14, 70, registers=4 * registers, gated=gated)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == layouts.hf_dinov2(own)
    system = "webdino" if gated and not registers else "dinov2"
    frozen = load_frozen(f"{system}:{tmp_path}", device=CPU)
    for height, width in ((70, 70), (98, 140), (42, 56)):
        images = torch.randn(2, 3, height, width)
        want = model(images, output_attentions=True)
        (tokens,) = frozen.backbone(images)
        torch.testing.assert_close(tokens.cls, want.last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)
        first = 1 + 4 * registers
        torch.testing.assert_close(tokens.patches, want.last_hidden_state[:, first:], rtol=1e-4, atol=1e-5)
        rows = want.attentions[-1][:, :, 0, first:]
        torch.testing.assert_close(frozen.backbone.cls_attention(images), rows, rtol=1e-4, atol=1e-6)
    alone = load_frozen(str(tmp_path / "model.safetensors"), device=CPU)
    assert alone.fingerprint == frozen.fingerprint
    assert alone.name == frozen.name


def test_a_folder_in_parts(tmp_path: Path) -> None:
    ported(tmp_path / "whole", registers=False, gated=True)
    ported(tmp_path / "parts", registers=False, gated=True, max_shard_size="1MB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    whole, parts = (load_frozen(f"webdino:{tmp_path / name}", device=CPU) for name in ("whole", "parts"))
    assert whole.fingerprint == parts.fingerprint
    index = tmp_path / "parts" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, part = next(iter(content["weight_map"].items()))
    for wrong, words in {
        "{": "not the index of a model in parts",
        "[]": "not the index of a model in parts",
        json.dumps({"weight_map": content["weight_map"] | {first: "../else.safetensors"}}): "outside its folder",
        json.dumps({"weight_map": content["weight_map"] | {"more": part}}): r"1 tensors are in no part \(more\)",
        json.dumps({"weight_map": content["weight_map"] | {first: "none.safetensors"}}): "no such file",
    }.items():
        index.write_text(wrong)
        with pytest.raises(CrispError, match=words) as caught:
            load_frozen(f"webdino:{tmp_path}/parts", device=CPU)
        assert "\n" not in str(caught.value)


def test_qkv_that_is_not_whole(tmp_path: Path) -> None:
    weights = layouts.filled(layouts.hf_dinov2(layouts.dinov2(192, 3, 14, 70)))
    del weights["encoder.layer.1.attention.attention.key.weight"]
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(CrispError, match=r"blocks.1.attn.qkv.weight is 384×192, its other tensors imply 576×192"):
        load_frozen(str(tmp_path / "w.pth"), device=CPU)


def test_dinov2s_own_rules_for_positions(tmp_path: Path) -> None:
    rules = {}
    for registers in (0, 4):
        path = tmp_path / f"{registers}.pth"
        torch.save(layouts.filled(layouts.dinov2(192, 1, 14, 70, registers=registers)), path)
        rules[registers] = load_frozen(str(path), device=CPU).backbone.facts["positions"]
    assert rules == {0: "scale .1", 4: "size, antialias"}


@pytest.mark.slow
def test_a_file_of_two_blocks_as_wide_as_the_7b(tmp_path: Path) -> None:
    """bfloat16, chunked; one block's answer is computed from the file's tensors, written plainly."""
    shapes = layouts.dinov2(4096, 2, 14, 224, gated=True, chunks=2)
    torch.manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        # a small period is enough, and quick to draw
        drawn = torch.randn(4099).bfloat16()
        flat = drawn.repeat(-(-torch.Size(shape).numel() // 4099))[: torch.Size(shape).numel()]
        state[name] = flat.reshape(shape) * (0.02 if len(shape) > 1 else 0.3)
    torch.save(state, tmp_path / "webssl.pth")
    model = load_frozen(str(tmp_path / "webssl.pth"), device=CPU)
    assert model.name == "Web-DINO ViT-7B/14"
    assert (model.backbone.depth, model.backbone.facts["heads"], model.backbone.native_px) == (2, 32, 224)
    images = torch.randn(1, 3, 56, 42)
    got = model.backbone(images, last=2)[0]

    def w(name: str) -> torch.Tensor:
        return state[name].float()

    def layer_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * w(f"{name}.weight") + w(f"{name}.bias")

    def affine(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w(f"{name}.weight").T + w(f"{name}.bias")

    pixels = images.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = pixels @ w("patch_embed.proj.weight").flatten(1).T + w("patch_embed.proj.bias")
    table = w("pos_embed")[:, 1:].reshape(1, 16, 16, 4096).permute(0, 3, 1, 2)
    factors = (4.1 / 16, 3.1 / 16)
    x = x + torch.nn.functional.interpolate(table, scale_factor=factors, mode="bicubic").flatten(2).mT
    x = torch.cat([w("cls_token") + w("pos_embed")[:, :1], x], 1)
    qkv = affine(layer_norm(x, "blocks.0.0.norm1"), "blocks.0.0.attn.qkv")
    q, k, v = (part.unflatten(-1, (32, 128)).transpose(1, 2) for part in qkv.chunk(3, -1))
    attended = ((q @ k.mT / 128**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + w("blocks.0.0.ls1.gamma") * affine(attended, "blocks.0.0.attn.proj")
    gate, up = affine(layer_norm(x, "blocks.0.0.norm2"), "blocks.0.0.mlp.w12").chunk(2, -1)
    x = x + w("blocks.0.0.ls2.gamma") * affine(gate * gate.sigmoid() * up, "blocks.0.0.mlp.w3")
    want = layer_norm(x, "norm")
    torch.testing.assert_close(got.cls, want[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.patches, want[:, 1:], rtol=1e-3, atol=1e-3)
