"""Exported backbones, each loaded by the library that it is for: the tokens are those of our own backbone."""

import copy
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from crisp import cli
from crisp.checkpoint import save_checkpoint
from crisp.config import TrainConfig
from crisp.errors import CrispError
from crisp.evals.images import CentreCrop, normalised
from crisp.export import command, onnx_format
from crisp.export.command import export
from crisp.export.config import ExportConfig
from crisp.models.student_teacher import StudentTeacher
from crisp.models.trained import load_trained
from crisp.models.vit import Tokens
from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.runs import CHECKPOINTS, create_run

ONNX = "ONNX is not installed: pip install 'crisp-ssl[export]'"


def ours(run: Path, images: Tensor, which: Any = "teacher") -> Tokens:
    tokens: Tokens = load_trained(run, which=which).network.backbone(images)
    return tokens


def pictures(batch: int = 3, side: int = 64) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(batch, 3, side, side)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def check_tokens(got: Tensor, want: Tokens, norm: str) -> None:
    """Of [B, 1+n, D], those that the norm belongs to; the other kind must not pass for ours."""
    if norm == "cls":
        close(got[:, 0], want.cls)
        assert (got[:, 1:] - want.patches).abs().max() > 0.1
    else:
        close(got[:, 1:], want.patches)
        assert (got[:, 0] - want.cls).abs().max() > 0.1


def load_other_norm(layer: nn.LayerNorm, out: Path) -> nn.LayerNorm:
    other = copy.deepcopy(layer)
    record = json.loads((out / "crisp.json").read_text())["other_norm"]
    other.load_state_dict(safetensors.torch.load_file(out / record["file"]))
    return other


def load_timm(out: Path) -> Any:
    return timm.create_model(f"local-dir:{out}", pretrained=True).eval().requires_grad_(False)


def load_hf(out: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    vit, report = transformers.ViTModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert not any(report.values()), report
    return vit.eval().requires_grad_(False)


@pytest.mark.parametrize("norm", ["cls", "patch"])
def test_timm(make_run: Any, tmp_path: Path, norm: Any) -> None:
    run, out, images = make_run(), tmp_path / "out", pictures()
    assert export(ExportConfig(source=run, out=out, norm=norm)) == out
    want, vit = ours(run, images), load_timm(out)
    check_tokens(vit.forward_features(images), want, norm)
    close(vit(images), want.cls if norm == "cls" else want.patches.mean(1))
    vit.norm, first = nn.Identity(), vit.norm
    other = load_other_norm(first, out)
    raw = vit.forward_features(images)
    close(other(raw[:, 1:]) if norm == "cls" else other(raw[:, 0]), want.patches if norm == "cls" else want.cls)

    config = json.loads((out / "config.json").read_text())
    by_name = timm.create_model(
        config["architecture"], checkpoint_path=out / "model.safetensors", num_classes=0, **config["model_args"]
    )
    check_tokens(by_name.eval().requires_grad_(False).forward_features(images), want, norm)
    data = timm.data.resolve_model_data_config(vit)
    assert (data["input_size"], data["interpolation"], data["crop_pct"]) == ((3, 64, 64), "bicubic", 0.875)
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(data["std"]) == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("norm", ["cls", "patch"])
def test_transformers(make_run: Any, tmp_path: Path, norm: Any) -> None:
    run, out, images = make_run(), tmp_path / "out", pictures()
    export(ExportConfig(source=run, out=out, format="hf", norm=norm))
    want, vit = ours(run, images), load_hf(out)
    check_tokens(vit(images).last_hidden_state, want, norm)
    assert vit.config.layer_norm_eps == 1e-6
    vit.layernorm, first = nn.Identity(), vit.layernorm
    other = load_other_norm(first, out)
    raw = vit(images).last_hidden_state
    close(other(raw[:, 1:]) if norm == "cls" else other(raw[:, 0]), want.patches if norm == "cls" else want.cls)


def test_transformers_prepares_images_as_the_evaluations_do(make_run: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export(ExportConfig(source=make_run(), out=tmp_path / "out", format="hf"))
    prepare = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    ramp = np.linspace(0, 255, 150 * 200 * 3).reshape(150, 200, 3).astype(np.uint8)
    got = prepare(Image.fromarray(ramp), return_tensors="pt")["pixel_values"]

    crop = np.array(CentreCrop(resize_px=73, crop_px=64)(Image.fromarray(ramp), 0))
    want = normalised(torch.from_numpy(crop)[None], mean=IMAGENET_MEAN, std=IMAGENET_STD, device=torch.device("cpu"))
    torch.testing.assert_close(got, want, rtol=0, atol=0.1)  # two resizers


@pytest.mark.parametrize(
    ("arch", "patch_px"),
    [("vit_tiny_patch16_224", 16), ("vit_giant_patch14_dinov2", 14), ("beit3_base_patch16_224", 16)],
)
def test_onnx(make_run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], arch: str, patch_px: int) -> None:
    """Plain, and with the parts that other formats lack: LayerScale and gated MLPs, norms within attention and MLP."""
    pytest.importorskip("onnxscript", reason=ONNX)
    onnxruntime = pytest.importorskip("onnxruntime", reason=ONNX)
    run, out = make_run(arch=arch, patch_px=patch_px), tmp_path / "out"
    export(ExportConfig(source=run, out=out, format="onnx"))
    assert capfd.readouterr().out == ""
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):  # one graph for all
        images = pictures(batch, side=4 * patch_px)
        cls, patches = session.run(["cls", "patches"], {"images": images.numpy()})
        want = ours(run, images)
        close(torch.from_numpy(cls), want.cls)
        close(torch.from_numpy(patches), want.patches)
    assert {path.name for path in out.iterdir()} == {"model.onnx", "crisp.json"}


def test_large_onnx_weights_get_a_file_of_their_own(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript", reason=ONNX)
    onnxruntime = pytest.importorskip("onnxruntime", reason=ONNX)
    monkeypatch.setattr(onnx_format, "MAX_INLINE_BYTES", 1)
    run, out, images = make_run(), tmp_path / "out", pictures()
    export(ExportConfig(source=run, out=out, format="onnx"))
    assert (out / "model.onnx.data").stat().st_size > 100_000
    out = out.rename(tmp_path / "moved")
    cls, _ = onnxruntime.InferenceSession(out / "model.onnx").run(["cls", "patches"], {"images": images.numpy()})
    close(torch.from_numpy(cls), ours(run, images).cls)


@pytest.mark.parametrize("format_", ["timm", "hf"])
def test_the_student_and_one_norm_for_all(make_run: Any, tmp_path: Path, format_: Any) -> None:
    run, out, images = make_run(shared_norm=True), tmp_path / "out", pictures()
    export(ExportConfig(source=run, out=out, format=format_, network="student"))
    want = ours(run, images, "student")
    got = load_timm(out).forward_features(images) if format_ == "timm" else load_hf(out)(images).last_hidden_state
    close(got[:, 0], want.cls)
    close(got[:, 1:], want.patches)
    record = json.loads((out / "crisp.json").read_text())
    assert (record["other_norm"], record["network"], record["step"]) == (None, "student", 2)
    assert not (out / "other_norm").exists()


@pytest.mark.parametrize("arch", ["vit_base_patch16_plus_240", "vit_base_patch16_224_miil"])
def test_layer_scale_is_folded_and_qkv_may_lack_its_bias(make_run: Any, tmp_path: Path, arch: str) -> None:
    run, images = make_run(arch=arch), pictures()
    export(ExportConfig(source=run, out=tmp_path / "timm"))
    export(ExportConfig(source=run, out=tmp_path / "hf", format="hf"))
    want = ours(run, images)
    close(load_timm(tmp_path / "timm").forward_features(images)[:, 0], want.cls)
    close(load_hf(tmp_path / "hf")(images).last_hidden_state[:, 0], want.cls)


@pytest.mark.parametrize("arch", ["eva_large_patch14_196", "vit_intern300m_patch14_448"])
def test_names_whose_norm_timm_places_elsewhere(make_run: Any, tmp_path: Path, arch: str) -> None:
    run, out, images = make_run(arch=arch, patch_px=14), tmp_path / "out", pictures(side=56)
    export(ExportConfig(source=run, out=out, norm="patch"))
    check_tokens(load_timm(out).forward_features(images), ours(run, images), "patch")


def test_models_that_a_format_cannot_express(make_run: Any, tmp_path: Path) -> None:
    beit = make_run("beit", arch="beit3_base_patch16_224")
    gated = make_run("gated", arch="vit_giant_patch14_dinov2", patch_px=14)
    cases = {
        (beit, "timm"): "timm's model ends in LayerNorm.*; export it with --format onnx",
        (beit, "hf"): "norms other than LayerNorms of eps 1e-06, which .* lacks; take another",
        (gated, "hf"): "an MLP of another kind",
    }
    for (run, format_), words in cases.items():
        with pytest.raises(CrispError, match=words) as caught:
            export(ExportConfig(source=run, out=tmp_path / "out", format=format_))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_whole_or_absent(make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = make_run(), tmp_path / "deep" / "out"
    (tmp_path / "deep" / ".partial-out").mkdir(parents=True)
    (tmp_path / "deep" / ".partial-out" / "left by a killed export").touch()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(command, "write_other_norm", fail)
        with pytest.raises(CrispError, match=r"cannot be written \(No space left on device\); make room, or choose"):
            export(ExportConfig(source=run, out=out))
    assert not list(out.parent.iterdir())
    export(ExportConfig(source=run, out=out))
    files = [path for path in out.rglob("*") if path.is_file()]
    names = {"config.json", "model.safetensors", "other_norm/norm.safetensors", "crisp.json"}
    assert {str(path.relative_to(out)) for path in files} == names
    # timm up to 1.0.28 fails where there are two
    assert len(list(out.glob("*.safetensors"))) == 1
    os.umask(umask := os.umask(0))
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}, "readable as other files are"
    with pytest.raises(CrispError, match="out: exists already; remove it, or give another folder"):
        export(ExportConfig(source=run, out=out))
    (tmp_path / "file").touch()
    with pytest.raises(CrispError, match="cannot be written"):
        export(ExportConfig(source=run, out=tmp_path / "file" / "out"))


def test_a_missing_extra_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(CrispError, match=r"format=onnx: .*onnxscript.*; pip install 'crisp-ssl\[export\]'"):
        export(ExportConfig(source=tmp_path / "nowhere", out=tmp_path / "out", format="onnx"))


def test_the_command(make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out, images = make_run(), tmp_path / "out", pictures()
    checkpoint = run / "checkpoints" / "step-00000001"
    arguments = ["--format", "timm", "--norm", "patch", "--network", "student"]
    assert cli.main(["export", str(checkpoint), str(out), *arguments]) == 0
    close(load_timm(out).forward_features(images)[:, 1:], ours(checkpoint, images, "student").patches)
    capsys.readouterr()
    for args, words in {
        (str(run), str(out)): "exists already",
        (str(tmp_path), str(tmp_path / "b")): "neither a run",
        (str(run), str(tmp_path / "b"), "--format", "onnx", "--norm", "cls"): "norm=cls: an ONNX file holds both norms",
    }.items():
        assert cli.main(["export", *args]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line


@pytest.mark.slow
def test_the_snippets_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/export.md from top to bottom, on an untrained ViT-S/16."""
    for package in ("transformers", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(recipe="vits16")
    create_run(config)
    pair = StudentTeacher(config.model, config.region, config.views)
    content = {name: getattr(pair, name).state_dict(keep_vars=True) for name in ("student", "teacher")}
    save_checkpoint(config.run_folder / CHECKPOINTS, content, {}, step=1, doomed=lambda steps: steps[:-1])
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    for line in re.findall(r"^crisp (export .*?) *(?:#.*)?$", text, re.MULTILINE):
        assert cli.main(line.split()) == 0
    names: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(snippet, names)
    assert names["cls"].shape == (5, 384)
    assert names["patches"].shape == (5, 196, 384)
