"""Runs of our own as frozen backbones: each kind of token through its norm."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from crisp.checkpoint import save_checkpoint
from crisp.config import TrainConfig
from crisp.errors import CrispError
from crisp.models.published import load_frozen
from crisp.models.published.ours import is_run
from crisp.models.student_teacher import StudentTeacher
from crisp.models.trained import load_trained
from crisp.runs import CHECKPOINTS, create_run

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path, configs: Any) -> Path:
    """A run with checkpoints of steps 1 and 2, all parameters drawn, with a norm for each kind of token."""
    config = TrainConfig(
        recipe="test",
        out=tmp_path / "run",
        model=configs.model(shared_norm=False),
        region=configs.region(),
        views=configs.views,
    )
    create_run(config)
    for step in (1, 2):
        torch.manual_seed(step)
        pair = StudentTeacher(config.model, config.region, config.views)
        for parameter in pair.parameters():
            parameter.data = 0.2 * torch.randn_like(parameter)
        content = {name: getattr(pair, name).state_dict(keep_vars=True) for name in ("student", "teacher")}
        save_checkpoint(tmp_path / "run" / CHECKPOINTS, content, {}, step=step, doomed=lambda steps: steps[:-2])
    return tmp_path / "run"


def test_a_run_and_its_checkpoints(run: Path) -> None:
    newest = load_frozen(str(run), device=CPU)
    assert newest.name == "CRISP vit_tiny_patch16_224 step 2"
    assert newest.fingerprint == load_frozen(f"{run}/{CHECKPOINTS}/step-00000002", device=CPU).fingerprint
    older = load_frozen(f"{run}/{CHECKPOINTS}/step-00000001", device=CPU)
    assert older.name == "CRISP vit_tiny_patch16_224 step 1"
    assert older.fingerprint != newest.fingerprint
    backbone = newest.backbone
    assert (backbone.dim, backbone.depth, backbone.patch_px, backbone.native_px) == (32, 2, 16, 64)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert "its heads left out" in newest.account


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_tokens_are_the_networks(run: Path, size: tuple[int, int]) -> None:
    vit = load_trained(run).network.backbone
    backbone = load_frozen(str(run), device=CPU).backbone
    images = torch.randn(2, 3, *size)
    want = vit(images)
    first, last = backbone(images, last=2)
    assert last.cls is not None
    torch.testing.assert_close(last.cls, want.cls)
    torch.testing.assert_close(last.patches, want.patches)
    torch.testing.assert_close((first.patches + last.patches) / 2, vit.forward_last_blocks(images, blocks=2))
    assert (vit.norm_cls(want.raw_patches) - want.patches).abs().max() > 0.1  # the norms are two
    x = vit.blocks[0](vit._embed(images))
    torch.testing.assert_close(first.cls, vit.norm_cls(x[:, 0]))
    attn = vit.blocks[1].attn
    q, k, _ = attn.qkv(vit.blocks[1].norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    rows = (q[:, :, 0, None] @ k.mT / 4).softmax(-1)[:, :, 0, 1:]
    torch.testing.assert_close(backbone.cls_attention(images), rows, rtol=1e-4, atol=1e-6)


def test_refusals(run: Path, tmp_path: Path) -> None:
    backbone = load_frozen(str(run), device=CPU).backbone
    with pytest.raises(CrispError, match="images of 60×64 px: the model has patches of 16"):
        backbone(torch.zeros(1, 3, 60, 64))
    with pytest.raises(CrispError, match="the last 3 blocks: the model has 2"):
        backbone(torch.zeros(1, 3, 64, 64), last=3)
    assert not is_run(tmp_path)
    with pytest.raises(CrispError, match=r"a folder, neither a run of 'crisp train' nor one with model.safetensors"):
        load_frozen(str(tmp_path), device=CPU)
    # a model of Hugging Face in a folder of that name, beside its config.json
    folder = tmp_path / CHECKPOINTS / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    assert not is_run(folder)
    shutil.rmtree(run / CHECKPOINTS)
    with pytest.raises(CrispError, match="no checkpoint yet"):
        load_frozen(str(run), device=CPU)
