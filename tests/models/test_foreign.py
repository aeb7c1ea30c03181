"""Weights in the official layouts of iBOT, DINO, DINOv2 and timm: every key accounted for, features kept.

What the files of this test hold is checked against `tests.models.published.layouts`, which names the code of each
system (repository and commit) that its lists are taken from. timm's keys are those of the timm that is installed.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor

from crisp.checkpoint import list_checkpoints, load_module_state
from crisp.config import InitConfig, ModelConfig, RegionConfig, ViewsConfig
from crisp.errors import CrispError
from crisp.models.foreign import read_layout
from crisp.models.initialise import InitReport, initialise
from crisp.models.student_teacher import StudentTeacher
from crisp.models.weights_file import read_weights
from crisp.recipes import demo
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from crisp.trainer import train
from tests.models.published import layouts


def reference_vit(**changes: Any) -> Any:
    """timm's own ViT, every parameter drawn: zeros and ones would hide mistakes."""
    torch.manual_seed(1)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 0} | changes
    vit = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    for parameter in vit.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    return vit.requires_grad_(False)


def head(*, dim: int = 32, prototypes: int = 64) -> dict[str, Tensor]:
    torch.manual_seed(2)
    shapes = {
        "mlp.0.weight": (48, dim), "mlp.0.bias": (48,), "mlp.2.weight": (48, 48), "mlp.2.bias": (48,),
        "mlp.4.weight": (16, 48), "mlp.4.bias": (16,),
        "last_layer.weight_g": (prototypes, 1), "last_layer.weight_v": (prototypes, 16),
    }  # fmt: skip
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def ibot_run(vit: Any) -> dict[str, Any]:
    """As iBOT saves a run: the teacher has no mask token, args is a Namespace, the head is shared."""
    heads = head() | {f"last_layer2.{k}": head()[f"last_layer.{k}"] for k in ("weight_g", "weight_v")}
    teacher = {f"backbone.{k}": v for k, v in vit.state_dict().items()} | {f"head.{k}": v for k, v in heads.items()}
    student = {f"module.{k}": v + 1 for k, v in teacher.items()}
    student["module.backbone.masked_embed"] = torch.full((1, 32), 7.0)
    return {
        "student": student, "teacher": teacher, "optimizer": {"state": {}}, "epoch": 800,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4), "fp16_scaler": {"scale": 1.0},
        "ibot_loss": {"center": torch.zeros(1, 64), "center2": torch.zeros(1, 1, 64)},
    }  # fmt: skip


def dino_run(vit: Any) -> dict[str, Any]:
    """As DINO saves a run."""
    teacher = {f"backbone.{k}": v for k, v in vit.state_dict().items()} | {f"head.{k}": v for k, v in head().items()}
    return {
        "student": {f"module.{k}": v + 1 for k, v in teacher.items()}, "teacher": teacher,
        "optimizer": {"state": {}}, "epoch": 100, "args": argparse.Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.zeros(1, 64)}, "fp16_scaler": {"scale": 1.0},
    }  # fmt: skip


def dinov2_backbone(vit: Any, *, chunked: bool) -> dict[str, Tensor]:
    """As DINOv2 saves a backbone; in one chunk, where it is chunked."""
    weights = {k.replace("blocks.", "blocks.0.") if chunked else k: v for k, v in vit.state_dict().items()}
    return weights | {"mask_token": torch.ones(1, 32)}


def shapes_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Networks and losses of a file as `layouts` has them, without what a run keeps beside them."""
    return {
        key: shapes_of(value) if isinstance(value, dict) else tuple(value.shape)
        for key, value in content.items()
        if isinstance(value, Tensor) or (isinstance(value, dict) and key not in ("optimizer", "fp16_scaler"))
    }


def test_files_of_this_test_have_the_published_keys() -> None:
    vit = layouts.vit(32, 2, 16, 64)
    sizes = {"hidden": 48, "bottleneck": 16, "out": 64}
    assert shapes_of(ibot_run(reference_vit())) == layouts.ibot_run(vit, **sizes)
    assert shapes_of(dino_run(reference_vit())) == layouts.dino_run(vit, **sizes)
    assert shapes_of(reference_vit().state_dict()) == vit
    scaled = reference_vit(init_values=0.1)
    for chunks in (0, 1):
        got = shapes_of(dinov2_backbone(scaled, chunked=bool(chunks)))
        assert got == layouts.dinov2(32, 2, 16, 64, chunks=chunks)


def start(configs: Any, source: Path, **changes: Any) -> tuple[StudentTeacher, InitReport]:
    init = {name: changes.pop(name) for name in ("which", "heads") if name in changes}
    torch.manual_seed(0)
    pair = StudentTeacher(configs.model(**changes), configs.region(), configs.views)
    report = initialise(pair, InitConfig(weights=str(source), **init))
    for name, tensor in pair.student.state_dict().items():
        assert torch.equal(tensor, pair.teacher.state_dict()[name]), name
    return pair.eval(), report


def same_features(pair: StudentTeacher, vit: Any) -> None:
    images = torch.randn(2, 3, 64, 64)
    want = vit.forward_features(images)
    with torch.no_grad():
        got = pair.teacher.backbone(images)
    torch.testing.assert_close(got.cls, want[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.patches, want[:, 1:], rtol=1e-4, atol=1e-5)


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_a_run_of_ibot(configs: Any, tmp_path: Path) -> None:
    vit = reference_vit()
    content = ibot_run(vit)
    pair, report = start(configs, save(tmp_path / "checkpoint.pth", content))
    same_features(pair, vit)
    assert report.layout == "iBOT, teacher of a whole run"
    network = pair.student
    assert torch.equal(network.backbone.mask_token, torch.full((1, 32), 7.0))
    for kind in ("cls", "patch", "region"):
        assert torch.equal(network.heads.mlp[kind][2].weight, head()["mlp.2.weight"])
        assert torch.equal(network.heads.last_layer[kind].weight_v, head()["last_layer.weight_v"])
    assert all(name.startswith("concept.") for name in report.fresh)
    keys = {f"{n}.{k}" for n in ("student", "teacher") for k in content[n]} | (content.keys() - {"student", "teacher"})
    assert report.loaded.keys() | report.ignored.keys() == keys
    assert not report.loaded.keys() & report.ignored.keys()
    student, _ = start(configs, tmp_path / "checkpoint.pth", which="student")
    assert torch.equal(student.student.backbone.cls_token, vit.cls_token + 1)
    bare, report = start(configs, tmp_path / "checkpoint.pth", heads=False)
    assert not torch.equal(bare.student.heads.mlp["cls"][2].weight, head()["mlp.2.weight"])
    assert "its head: --init.no-heads" in report.ignored.values()


def test_other_layouts_keep_the_features(configs: Any, tmp_path: Path) -> None:
    vit = reference_vit()
    weights = vit.state_dict()
    files = {
        "iBOT, bare": {"state_dict": weights},
        "DINO, bare": weights,
        "DINO, run": dino_run(vit),
        "timm": weights | {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)},
    }
    for name, content in files.items():
        pair, report = start(configs, save(tmp_path / f"{name}.pth", content))
        same_features(pair, vit)
        assert "backbone.mask_token" in report.fresh
        assert pair.student.backbone.mask_token.count_nonzero() == 0
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "w.safetensors")
    same_features(start(configs, tmp_path / "w.safetensors")[0], vit)


@pytest.mark.parametrize("chunked", [False, True])
def test_layer_scale_of_dinov2_is_folded(configs: Any, tmp_path: Path, chunked: bool) -> None:
    vit = reference_vit(init_values=0.1)
    pair, report = start(configs, save(tmp_path / "w.pth", dinov2_backbone(vit, chunked=chunked)))
    same_features(pair, vit)
    assert report.layout == "DINOv2, bare"
    assert len(report.folded) == 4
    assert torch.equal(pair.teacher.backbone.mask_token, torch.ones(1, 32))


def test_another_grid_is_resized(configs: Any, tmp_path: Path) -> None:
    weights = reference_vit(img_size=112).state_dict()
    pair, report = start(configs, save(tmp_path / "w.pth", weights))
    table = weights["pos_embed"][:, 1:].reshape(1, 7, 7, 32).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(table, size=(4, 4), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(pair.student.backbone.pos_embed[:, 1:], want)
    assert list(report.resized.values()) == ["position embedding, 7×7 → 4×4 patches"]


def test_the_official_keys_fill_the_backbone(tmp_path: Path) -> None:
    shapes = layouts.vit(384, 12, 16, 224)  # of iBOT's and DINO's published ViT-S/16
    assert len(shapes) == 150
    path = save(tmp_path / "w.pth", {"state_dict": {name: torch.zeros(shape) for name, shape in shapes.items()}})
    pair = StudentTeacher(ModelConfig(prototypes=8), RegionConfig(), ViewsConfig())
    report = initialise(pair, InitConfig(weights=str(path)))
    assert len(report.loaded) == 150
    assert not report.ignored
    assert [name for name in report.fresh if name.startswith("backbone.")] == ["backbone.mask_token"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embed_dim": 64}, "width 32 there and 64 here"),
        ({"depth": 3}, "2 blocks there and 3 here; set --model.depth 2"),
        ({"prototypes": 32}, "model.prototypes=32, and its head has 64; set --model.prototypes 64"),
        ({"head_hidden": 32}, "model.head_hidden=32"),
    ],
)
def test_another_size_names_the_field(configs: Any, tmp_path: Path, changes: dict[str, int], words: str) -> None:
    with pytest.raises(CrispError, match=words) as caught:
        start(configs, save(tmp_path / "w.pth", ibot_run(reference_vit())), **changes)
    assert "\n" not in str(caught.value)


def test_last_layers_that_differ_cannot_be_shared(configs: Any, tmp_path: Path) -> None:
    content = ibot_run(reference_vit())
    content["teacher"]["head.last_layer2.weight_v"] = torch.ones(64, 16)
    path = save(tmp_path / "w.pth", content)
    pair, _ = start(configs, path)
    assert torch.equal(pair.student.heads.last_layer["region"].weight_v, torch.ones(64, 16))
    with pytest.raises(CrispError, match="its last layers of cls and patch differ"):
        start(configs, path, head_last_layer="shared")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("register_tokens", "register tokens"),
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("norm_pre.weight", "a norm before its blocks"),
        ("wings.weight", r"1 keys have no known meaning \(wings.weight\)"),
    ],
)
def test_parts_that_are_not_ours_are_refused(key: str, words: str) -> None:
    with pytest.raises(CrispError, match=words):
        read_layout(reference_vit().state_dict() | {key: torch.zeros(1, 4, 32)}, source="w.pth")


def test_patches_missing_tensors_and_nan(configs: Any, tmp_path: Path) -> None:
    weights = reference_vit().state_dict()
    cases = {
        "patches of 14 px there": weights | {"patch_embed.proj.weight": torch.zeros(32, 3, 14, 14)},
        r"lacks 1 tensors of the backbone \(norm.bias\)": {k: v for k, v in weights.items() if k != "norm.bias"},
        "cls_token holds NaN": weights | {"cls_token": torch.full((1, 1, 32), torch.nan)},
        "no layout that is known": {"conv.weight": torch.zeros(3)},
    }
    for words, content in cases.items():
        with pytest.raises(CrispError, match=words):
            start(configs, save(tmp_path / "w.pth", content))


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    bad = save(tmp_path / "bad.pth", {"state_dict": Malicious(tmp_path / "ran")})
    with pytest.raises(CrispError, match=r"pickles a \w+\.mkdir, which could run code and is not loaded"):
        read_weights(str(bad))
    assert not (tmp_path / "ran").exists()
    whole = save(tmp_path / "whole.pth", reference_vit().state_dict()).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("Not found\n")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.safetensors").write_text("Not found\n")
    for name in ("cut.pth", "text.pth", "empty.pth", "text.safetensors"):
        with pytest.raises(CrispError, match="download it again") as caught:
            read_weights(str(tmp_path / name))
        assert "\n" not in str(caught.value), name
    for source, words in {
        str(tmp_path / "none.pth"): "no such file",
        "timm:vit_none": "no such pretrained model",
        str(save(tmp_path / "list.pth", [1, 2])): "holds a list",
    }.items():
        with pytest.raises(CrispError, match=words):
            read_weights(source)


@pytest.mark.slow
def test_a_run_starts_from_a_file(tmp_path: Path, photographs: dict[str, Any]) -> None:
    """Two steps from iBOT's layout; a resume before the first checkpoint starts from the file again."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for i in range(16):
        Image.fromarray(photographs["astronaut"][8 * i : 8 * i + 128, :150]).save(folder / f"{i}.jpg")
    shard_imagenet(ShardConfig(source=str(tmp_path / "images"), out=str(tmp_path / "shards"), workers=1))
    base = demo()
    config = replace(
        base,
        out=tmp_path / "run",
        data=replace(base.data, shards=str(tmp_path / "shards"), threads=1, renderer="cpu"),
        views=replace(base.views, reference_px=64, global_px=64, local_px=32, local_views=2),
        model=replace(
            base.model, embed_dim=32, depth=2, num_heads=2, head_hidden=48, head_bottleneck=16, prototypes=64
        ),
        optim=replace(base.optim, epochs=1, global_batch=8, warmup_epochs=1, base_lr=0.0, min_lr=0.0),
        init=InitConfig(weights=str(save(tmp_path / "w.pth", ibot_run(reference_vit())))),
    )
    run = train(config)
    assert set(json.loads((run / "init.json").read_text())) == {f.name for f in fields(InitReport)}
    shutil.rmtree(run / "checkpoints")
    for _ in range(2):  # from step 0, then from the last checkpoint, without the file
        train(config, resume=True)
        (checkpoint,) = list_checkpoints(run / "checkpoints")
        teacher = load_module_state(checkpoint, "teacher")
        torch.testing.assert_close(teacher["backbone.cls_token"], reference_vit().cls_token)
        (tmp_path / "w.pth").unlink(missing_ok=True)
