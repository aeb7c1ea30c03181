"""timm's models by name, with a file's weights, as timm itself runs them."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from crisp.errors import CrispError
from crisp.models.published import load_frozen
from crisp.models.published.timm_vit import arch_of, build_timm
from tests.models.published import layouts

CPU = torch.device("cpu")
SMALL = {"embed_dim": 128, "depth": 2, "num_heads": 2}

# What timm's registry has of kinds: plain, registers, gated, without CLS, distilled, norm after pooling, rotary.
NAMES = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_rope_reg1_gap_256",
    "eva02_tiny_patch14_224",
]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the named kind that are small in width and depth."""
    create = timm.create_model

    def small(name: str, **options: Any) -> Any:
        sizes = SMALL | ({"img_size": 56} if "img_size" not in options and "patch14" in name else {})
        return create(name, **(sizes | options))

    monkeypatch.setattr(timm, "create_model", small)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("narrow")
def test_tokens_are_timms(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit: Any = timm.create_model(name, dynamic_img_size=True).eval().requires_grad_(False)
    for parameter in vit.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    weights = {key: value.contiguous() for key, value in vit.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    model = load_frozen(f"timm:{name}@{tmp_path}/w.safetensors", device=CPU)
    backbone = model.backbone
    assert model.name == f"timm {name}"
    assert backbone.mean == vit.pretrained_cfg["mean"]
    assert backbone.std == vit.pretrained_cfg["std"]
    side = 6 * backbone.patch_px
    images = torch.randn(2, 3, side, side + backbone.patch_px)
    whole = vit.forward_features(images)
    (tokens,) = backbone(images)
    torch.testing.assert_close(tokens.patches, whole[:, vit.num_prefix_tokens :])
    assert tokens.patches.shape[1] == 42
    caught: list[torch.Tensor] = []
    attn = vit.blocks[-1].attn
    if vit.cls_token is None:
        assert tokens.cls is None
        with pytest.raises(CrispError, match="this model has no CLS token"):
            backbone.cls_attention(images)
        return
    assert tokens.cls is not None
    torch.testing.assert_close(tokens.cls, whole[:, 0])
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: caught.append(output))
    vit.forward_features(images)
    rows = backbone.cls_attention(images)
    torch.testing.assert_close(rows, caught[0][:, :, 0, vit.num_prefix_tokens :])
    assert rows.sum(-1).max() < 1
    assert backbone.vit.blocks[-1].attn.fused_attn  # as it was


@pytest.mark.usefixtures("narrow")
def test_another_grid_and_the_classifier(tmp_path: Path) -> None:
    """A file of another image size than the named model's; its classifier is left out."""
    full = timm.create_model("vit_tiny_patch16_224", img_size=96).eval().requires_grad_(False)
    torch.save({"state_dict": {f"module.{key}": value for key, value in full.state_dict().items()}}, tmp_path / "w.pth")
    model = load_frozen(f"timm:vit_tiny_patch16_224@{tmp_path}/w.pth", device=CPU)
    assert model.backbone.native_px == 96
    assert "2 its classifier" in model.account
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(model.backbone(images)[0].cls, full.forward_features(images)[:, 0])
    cut = {key: value for key, value in full.state_dict().items() if not key.startswith("blocks.")}
    torch.save(cut, tmp_path / "cut.pth")
    with pytest.raises(CrispError, match=r"not the keys of timm's vit_tiny_patch16_224: the file lacks blocks\.0"):
        load_frozen(f"timm:vit_tiny_patch16_224@{tmp_path}/cut.pth", device=CPU)


@pytest.mark.usefixtures("narrow")
def test_pretrained_weights_come_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timm:NAME` without the network: the download stands in for itself."""
    vit: Any = timm.create_model("vit_tiny_patch16_224").eval().requires_grad_(False)
    weights = vit.state_dict()
    monkeypatch.setattr("crisp.models.published.load.read_weights", lambda source: dict(weights))
    model = load_frozen("timm:vit_tiny_patch16_224", device=CPU)
    images = torch.randn(1, 3, 64, 64)
    vit.set_input_size((64, 64))
    torch.testing.assert_close(model.backbone(images)[0].cls, vit.forward_features(images)[:, 0])


@pytest.mark.usefixtures("narrow")
def test_refusals() -> None:
    weights = layouts.filled(layouts.vit(128, 2, 16, 224))
    for name, change, words in (
        ("vit_none", {}, "timm has no model vit_none"),
        ("resnet18", {}, "resnet18 is no plain Vision Transformer"),
        ("vit_relpos_small_patch16_224", {}, "is no plain Vision Transformer"),
        ("vit_tiny_patch16_224", {"norm.bias": torch.full((128,), torch.nan)}, "norm.bias holds NaN"),
        ("vit_tiny_patch16_224", {"wings": torch.zeros(1)}, "the file has wings, which it lacks"),
        (
            "vit_tiny_patch16_224",
            {"cls_token": torch.zeros(1, 1, 64)},
            "cls_token is 1×1×64 there and 1×1×128 in timm's vit_tiny_patch16_224; name another model",
        ),
    ):
        with pytest.raises(CrispError, match=words) as caught:
            build_timm(name, weights | change, source="timm:x")
        assert "\n" not in str(caught.value)
    assert arch_of("vit_b@/a@b.pth") == ("vit_b", "/a@b.pth")
    assert arch_of("vit_b") == ("vit_b", None)
    for wrong in ("", "@x.pth", "vit_b@"):
        with pytest.raises(CrispError, match="no name of a model"):
            arch_of(wrong)
