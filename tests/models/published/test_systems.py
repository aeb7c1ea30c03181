"""Every system's published layouts: recognised, every key accounted for, the architecture read from the shapes."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from crisp.models.published import SYSTEMS, load_frozen
from crisp.models.published.keys import flatten, sort_keys
from crisp.models.published.vit import IMAGENET_MEAN, IMAGENET_STD
from crisp.models.published.vit_system import VitSystem
from tests.models.published import layouts

CPU = torch.device("cpu")
RUN = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 800, "args": argparse.Namespace(arch="vit_small")}
RUN |= {"fp16_scaler": {"scale": 65536.0}}
MAE_RUN = {"optimizer": {"state": {}}, "epoch": 1599, "scaler": {"scale": 1.0}, "args": argparse.Namespace(lr=1e-4)}
IJEPA_RUN = {"opt": {"state": {}}, "scaler": {"scale": 1.0}, "epoch": 300, "loss": 0.1, "batch_size": 128,
             "world_size": 16, "lr": 1e-6}  # fmt: skip

VIT_S16 = layouts.vit(384, 12, 16, 224)
VIT_B8 = layouts.vit(768, 12, 8, 224)
VIT_L16 = layouts.vit(1024, 24, 16, 224)
IJEPA_H14 = layouts.vit(1280, 32, 14, 224, cls=False)
IJEPA_G16 = layouts.vit(1408, 40, 16, 224, cls=False, hidden=6144)


def dinov2(width: int, depth: int, **changes: Any) -> layouts.Shapes:
    return layouts.dinov2(width, depth, 14, 518, **changes)


def webdino(width: int, depth: int, image: int = 224) -> layouts.Shapes:
    return layouts.dinov2(width, depth, 14, image, gated=True, chunks=4)


# system, content, beside it, arch, (blocks, heads, native px), tensors loaded
OFFICIAL = [
    ("dino", VIT_S16, {}, "ViT-S/16", (12, 6, 224), 150),
    ("dino", VIT_B8, {}, "ViT-B/8", (12, 12, 224), 150),
    ("dino", layouts.dino_run(VIT_S16), RUN, "ViT-S/16", (12, 6, 224), 150),
    ("ibot", {"state_dict": VIT_S16}, {}, "ViT-S/16", (12, 6, 224), 150),
    ("ibot", layouts.ibot_run(VIT_L16), RUN, "ViT-L/16", (24, 16, 224), 294),
    ("sit", layouts.sit_run(VIT_S16), RUN, "ViT-S/16", (12, 6, 224), 150),
    ("croc", layouts.croc_run(VIT_S16), RUN, "ViT-S/16", (12, 6, 224), 150),
    ("cribo", layouts.cribo_run(VIT_S16), RUN, "ViT-S/16", (12, 6, 224), 150),
    ("mae", {"model": layouts.vit(768, 12, 16, 224)}, {}, "ViT-B/16", (12, 12, 224), 150),
    ("mae", {"model": layouts.mae(1280, 32, 14, 224)}, MAE_RUN, "ViT-H/14", (32, 16, 224), 390),
    ("ijepa", layouts.ijepa_run(IJEPA_H14), IJEPA_RUN, "ViT-H/14", (32, 16, 224), 389),
    ("ijepa", layouts.ijepa_run(IJEPA_G16, depth=16), IJEPA_RUN, "ViT-g/16", (40, 16, 224), 485),
    ("dinov2", dinov2(384, 12), {}, "ViT-S/14", (12, 6, 518), 174),
    ("dinov2", dinov2(768, 12, registers=4), {}, "ViT-B/14", (12, 12, 518), 175),
    ("dinov2", dinov2(1536, 40, gated=True), {}, "ViT-g/14", (40, 24, 518), 566),
    ("dinov2", layouts.dinov2_teacher(dinov2(1536, 40, gated=True, chunks=4)), {}, "ViT-g/14", (40, 24, 518), 566),
    ("dinov2", layouts.hf_dinov2(dinov2(768, 12)), {}, "ViT-B/14", (12, 12, 518), 174),
    ("dinov2", layouts.hf_dinov2(dinov2(1536, 40, gated=True, registers=4)), {}, "ViT-g/14", (40, 24, 518), 567),
    ("webdino", webdino(1024, 24), {}, "ViT-L/14", (24, 16, 224), 342),
    ("webdino", webdino(1536, 40), {}, "ViT-g/14", (40, 24, 224), 566),
    ("webdino", webdino(2688, 24), {}, "ViT-2B/14", (24, 21, 224), 342),
    ("webdino", webdino(4096, 32, 378), {}, "ViT-7B/14", (32, 32, 378), 454),
    ("webdino", webdino(4096, 32, 518), {}, "ViT-7B/14", (32, 32, 518), 454),
    ("webdino", layouts.dinov2_teacher(webdino(2688, 24)), {}, "ViT-2B/14", (24, 21, 224), 342),
    ("webdino", layouts.hf_dinov2(layouts.dinov2(4096, 32, 14, 224, gated=True)), {}, "ViT-7B/14", (32, 32, 224), 454),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shapes", "beside", "arch", "sizes", "loaded"),
    OFFICIAL,
    ids=[f"{case[0]}-{case[3]}-{i}" for i, case in enumerate(OFFICIAL)],
)
def test_published_layouts(
    name: str, shapes: Any, beside: dict[str, Any], arch: str, sizes: tuple[int, int, int], loaded: int
) -> None:
    state = layouts.filled(shapes, device="meta") | beside
    assert next(key for key, system in SYSTEMS.items() if system.recognise(state)) == name
    system = SYSTEMS[name]
    assert isinstance(system, VitSystem)
    keys = sort_keys(state, system.rules, source="file", system=name)
    assert {*keys.file_keys.values()} | keys.ignored.keys() == flatten(state).keys()
    assert not {*keys.file_keys.values()} & keys.ignored.keys()
    built = system.build(state, "file")
    backbone: Any = built.backbone
    assert len(set(keys.ignored.values())) == built.account.count("; ") + bool(keys.ignored)
    hf_parts = 4 * backbone.depth if any(key.startswith("encoder.layer.") for key in state) else 0  # q, k, v apart
    assert len(keys.tensors) == loaded + hf_parts
    assert built.account.startswith(f"{loaded + hf_parts} tensors loaded, ")
    assert built.arch_name == arch
    assert (backbone.depth, backbone.facts["heads"], backbone.native_px) == sizes
    assert (backbone.mean, backbone.std) == (IMAGENET_MEAN, IMAGENET_STD)
    side = 4 * backbone.patch_px
    (tokens,) = backbone(torch.empty(1, 3, side, 2 * side, device="meta"))
    assert tokens.patches.shape == (1, 32, backbone.dim)
    assert (tokens.cls is None) == (name == "ijepa")


TINY = layouts.vit(128, 3, 16, 64)
SMALL = {"hidden": 24, "bottleneck": 8, "out": 32}
TINY_RUNS = {
    "dino": layouts.dino_run(TINY, **SMALL),
    "ibot": layouts.ibot_run(TINY, **SMALL),
    "sit": layouts.sit_run(TINY, hidden=24, out=8),
    "croc": layouts.croc_run(TINY, out_c=16, **SMALL),
    "cribo": layouts.cribo_run(TINY, queue=4, tokens=2, out_c=16, **SMALL),
}


def timm_twin(weights: dict[str, torch.Tensor], **changes: Any) -> Any:
    sizes = {"embed_dim": 128, "depth": 3, "num_heads": 2, "img_size": 64, "num_classes": 0} | changes
    vit = timm.create_model("vit_base_patch16_224", **sizes).eval()
    vit.load_state_dict(weights)
    return vit.requires_grad_(False)


def same_tokens(backbone: Any, vit: Any, images: torch.Tensor) -> None:
    """The last two blocks' tokens are timm's, and so is the attention of CLS, computed here from its parts."""
    got = backbone(images, last=2)
    want = vit.forward_intermediates(
        images, indices=2, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    for tokens, (patches, prefix) in zip(got, want, strict=True):
        torch.testing.assert_close(tokens.patches, patches, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tokens.cls, prefix[:, 0], rtol=1e-5, atol=1e-5)
    x = vit._pos_embed(vit.patch_embed(images))
    for block in vit.blocks[:-1]:
        x = block(x)
    attn = vit.blocks[-1].attn
    q, k, _ = attn.qkv(vit.blocks[-1].norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    rows = (q[:, :, :1] @ k.transpose(-2, -1) / attn.head_dim**0.5).softmax(-1)[:, :, 0, vit.num_prefix_tokens :]
    torch.testing.assert_close(backbone.cls_attention(images), rows, rtol=1e-5, atol=1e-6)
    assert rows.std() > 1e-4  # not the same for all patches, which would hide a transposition


@pytest.mark.parametrize("name", list(TINY_RUNS))
def test_the_teacher_of_a_run_has_timms_features(name: str, tmp_path: Path) -> None:
    state = layouts.filled(TINY_RUNS[name])
    torch.save(state | RUN, tmp_path / "checkpoint.pth")
    model = load_frozen(f"{name}:{tmp_path}/checkpoint.pth", device=CPU)
    teacher = {key.removeprefix("module.").removeprefix("backbone."): value for key, value in state["teacher"].items()}
    vit = timm_twin({key: teacher[key] for key in TINY})
    same_tokens(model.backbone, vit, torch.randn(2, 3, 64, 64))
    assert load_frozen(str(tmp_path / "checkpoint.pth"), device=CPU).name == model.name  # recognised as what it is
    assert model.name == f"{SYSTEMS[name].title} ViT-128×3/16"
    assert "the student: the teacher is taken" in model.account
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not model.backbone.training


def test_a_bare_backbone_is_read_alike_by_all_that_made_it(tmp_path: Path) -> None:
    weights = layouts.filled(TINY)
    torch.save(weights, tmp_path / "bare.pth")
    vit = timm_twin(weights)
    prints = set()
    for name in TINY_RUNS:
        model = load_frozen(f"{name}:{tmp_path}/bare.pth", device=CPU)
        same_tokens(model.backbone, vit, torch.randn(2, 3, 64, 64))
        prints.add(model.fingerprint)
    assert len(prints) == 1
    assert load_frozen(str(tmp_path / "bare.pth"), device=CPU).name == "DINO ViT-128×3/16"


def test_mae_has_timms_features_without_its_decoder(tmp_path: Path) -> None:
    shapes = layouts.mae(128, 3, 16, 64, decoder_width=32, decoder_depth=1)
    state = layouts.filled({"model": shapes})
    torch.save(state | MAE_RUN, tmp_path / "mae.pth")
    model = load_frozen(str(tmp_path / "mae.pth"), device=CPU)
    same_tokens(model.backbone, timm_twin({key: state["model"][key] for key in TINY}), torch.randn(2, 3, 64, 64))
    assert model.name == "MAE ViT-128×3/16"


def test_ijepas_target_encoder_has_timms_features(tmp_path: Path) -> None:
    encoder = layouts.vit(128, 3, 16, 64, cls=False)
    state = layouts.filled(layouts.ijepa_run(encoder, width=32, depth=1)) | IJEPA_RUN
    torch.save(state, tmp_path / "ijepa.pth.tar")
    model = load_frozen(str(tmp_path / "ijepa.pth.tar"), device=CPU)
    weights = {key.removeprefix("module."): value for key, value in state["target_encoder"].items()}
    vit = timm_twin(weights, class_token=False, global_pool="")
    images = torch.randn(2, 3, 64, 64)
    (tokens,) = model.backbone(images)
    assert tokens.cls is None
    torch.testing.assert_close(tokens.patches, vit.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_has_timms_features(tmp_path: Path, registers: int, gated: bool) -> None:
    """timm's own conversion of the official layout is the twin."""
    shapes = layouts.dinov2(192, 3, 14, 70, registers=registers, gated=gated)
    state = layouts.filled(shapes)
    torch.save(state, tmp_path / "dinov2.pth")
    size = "giant" if gated else "small"
    vit: Any = timm.create_model(
        f"vit_{size}_patch14_reg4_dinov2" if registers else f"vit_{size}_patch14_dinov2",
        embed_dim=192, depth=3, num_heads=3, img_size=70, num_classes=0,
    ).eval()  # fmt: skip
    vit.load_state_dict(checkpoint_filter_fn(dict(state), vit))
    model = load_frozen(f"dinov2:{tmp_path}/dinov2.pth", device=CPU)
    same_tokens(model.backbone, vit, torch.randn(2, 3, 70, 70))
    # chunked, in the teacher of a run, and in Hugging Face's names it is the same backbone
    chunked = layouts.dinov2(192, 3, 14, 70, registers=registers, gated=gated, chunks=3)
    teacher = {f"backbone.{new}": state[old] for new, old in zip(chunked, shapes, strict=True)}
    torch.save({"teacher": teacher}, tmp_path / "teacher.pth")
    again = load_frozen(f"dinov2:{tmp_path}/teacher.pth", device=CPU)
    assert again.fingerprint == model.fingerprint


def test_a_published_size_has_timms_features(tmp_path: Path) -> None:
    weights = layouts.filled(layouts.vit(192, 12, 16, 224))
    torch.save(weights, tmp_path / "dino.pth")
    model = load_frozen(f"dino:{tmp_path}/dino.pth", device=CPU)
    assert model.name == "DINO ViT-Ti/16"
    vit: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    vit.load_state_dict(weights)
    with torch.no_grad():
        same_tokens(model.backbone, vit, torch.randn(1, 3, 224, 224))


def test_heads_of_published_widths() -> None:
    """As the constructors of each system's code have them; `layouts` names the code."""
    published = {
        "dino": {192: 3, 384: 6, 768: 12},
        "ibot": {384: 6, 768: 12, 1024: 16},
        "mae": {768: 12, 1024: 16, 1280: 16},
        "ijepa": {768: 12, 1024: 16, 1280: 16, 1408: 16},
        "dinov2": {384: 6, 768: 12, 1024: 16, 1536: 24},
        "webdino": {1024: 16, 1536: 24, 2688: 21, 3072: 24, 3584: 28, 4096: 32},
    }
    for name, widths in published.items():
        system = SYSTEMS[name]
        assert isinstance(system, VitSystem)
        assert {width: system.heads(width) for width in widths} == widths, name
