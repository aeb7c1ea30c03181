"""What a source names, what is said of files that fit nothing, and what a fingerprint stands for."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from crisp.errors import CrispError
from crisp.models.published import SYSTEMS, load_frozen
from crisp.models.published.fingerprint import fingerprint
from crisp.models.published.keys import KeyRules, flatten, sort_keys
from tests.models.published import layouts

CPU = torch.device("cpu")
TINY = layouts.vit(128, 2, 16, 64)


def save(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def refused(source: str, words: str) -> None:
    with pytest.raises(CrispError, match=words) as caught:
        load_frozen(source, device=CPU)
    assert "\n" not in str(caught.value)


def test_sources_that_name_nothing(tmp_path: Path) -> None:
    refused("dino:none.pth", "none.pth: no such file")
    refused("none.pth", "none.pth: no such file")
    refused("dion:none.pth", "dion:none.pth: no system dion; there are timm and .*croc.*dinov2.*webdino")
    refused("https://host/dino.pth", "no such file; download it")
    refused("timm:vit_none", "timm has no such pretrained model")
    assert sorted(SYSTEMS) == sorted({system.name for system in SYSTEMS.values()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"wings.weight": torch.zeros(3)},
            r"read as DINO, 1 keys have no known meaning \(wings.weight\); name another",
        ),
        ({"norm.bias": None}, r"it lacks 1 tensors \(norm.bias\)"),
        ({"pos_embed": None}, "no pos_embed, so no Vision Transformer that is known"),
        ({"pos_embed": torch.zeros(1, 16, 128)}, "15 position embeddings of patches make no square"),
        ({"cls_token": torch.full((1, 1, 128), torch.inf)}, "cls_token holds NaN or infinity"),
        ({"blocks.1.attn.qkv.weight": torch.zeros(384, 64)}, "blocks.1.attn.qkv.weight is 384×64, .* imply 384×128"),
        ({"patch_embed.proj.weight": torch.zeros(128, 1, 16, 16)}, "patch_embed.proj.weight is 128×1×16×16"),
        ({"patch_embed.proj.weight": torch.zeros(100, 3, 16, 16)}, "width 100: no multiple of 64"),
        ({"blocks.5.norm1.weight": torch.ones(128)}, "it lacks 47 tensors"),
        ({"backbone.cls_token": torch.ones(1, 1, 128)}, "cls_token and backbone.cls_token are the same weight of DINO"),
        ({"norm.weight": 3}, r"1 keys have no known meaning \(norm.weight\)"),
    ],
)
def test_files_that_are_not_whole(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    weights = {key: value for key, value in (layouts.filled(TINY) | change).items() if value is not None}
    refused("dino:" + save(tmp_path / "w.pth", weights), words)


def test_files_of_no_known_system(tmp_path: Path) -> None:
    for name, content in {
        "resnet": {"conv1.weight": torch.zeros(3)},
        # timm's classifier, and a run without the loss that names its system
        "timm": layouts.filled(TINY) | {"head.weight": torch.zeros(10, 128)},
        "stripped": {"teacher": layouts.filled(layouts.dino_run(TINY, hidden=8, bottleneck=8, out=8))["teacher"]},
    }.items():
        refused(save(tmp_path / f"{name}.pth", content), "are no system's that is known; name it: SYSTEM:FILE")
    load_frozen(f"dino:{tmp_path}/stripped.pth", device=CPU)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", layouts.filled(TINY) | {"args": Malicious(tmp_path / "ran")})
    for source in (path, f"dino:{path}", f"timm:vit_tiny_patch16_224@{path}"):
        refused(source, "which could run code and is not loaded")
    assert not (tmp_path / "ran").exists()


def test_the_fingerprint_stands_for_the_features(tmp_path: Path) -> None:
    weights = layouts.filled(TINY)
    plain = load_frozen("dino:" + save(tmp_path / "a.pth", weights), device=CPU)
    assert len(plain.fingerprint) == 64
    wrapped = {"teacher": {f"module.backbone.{key}": value for key, value in weights.items()}}
    assert load_frozen("dino:" + save(tmp_path / "b.pth", wrapped), device=CPU).fingerprint == plain.fingerprint
    half = {key: value.half().float() for key, value in weights.items()}
    stored_half = {key: value.half() for key, value in weights.items()}
    prints = [load_frozen("dino:" + save(tmp_path / "c.pth", w), device=CPU).fingerprint for w in (half, stored_half)]
    assert prints[0] == prints[1] != plain.fingerprint
    # the same tensors, but positions are resized in another way
    as_mae = load_frozen("mae:" + save(tmp_path / "d.pth", weights), device=CPU)
    assert as_mae.fingerprint != plain.fingerprint
    bias = plain.backbone.get_parameter("vit.blocks.1.mlp.fc1.bias")
    bias.data[3] = torch.nextafter(bias.data[3], torch.tensor(9.0))
    assert fingerprint(plain.backbone) != plain.fingerprint
    bias.data[3] = torch.nextafter(bias.data[3], torch.tensor(-9.0))
    assert fingerprint(plain.backbone) == plain.fingerprint


def test_the_file_can_go_once_it_is_loaded(tmp_path: Path) -> None:
    """Large files are mapped while they are read; the backbone holds none of that."""
    path = save(tmp_path / "w.pth", layouts.filled(TINY))
    model = load_frozen(f"dino:{path}", device=CPU)
    images = torch.randn(1, 3, 64, 64)
    before = model.backbone(images)[0].patches
    with open(path, "r+b") as file:
        file.write(b"\0" * os.path.getsize(path))
    torch.testing.assert_close(model.backbone(images)[0].patches, before)
    assert fingerprint(model.backbone) == model.fingerprint


def test_accounts() -> None:
    rules = KeyRules(weights=((r"net\.(.+)", r"\1"),), ignored=((r"opt(\..*)?", "its optimiser"), (r"n", "a number")))
    state = {"net": {"a": torch.ones(1), "b": torch.ones(2)}, "opt": {"state": {0: {}}}, "n": 3}
    keys = sort_keys(state, rules, source="w.pth", system="X")
    assert keys.file_keys == {"a": "net.a", "b": "net.b"}
    assert keys.ignored == {"opt": "its optimiser", "n": "a number"}
    assert keys.account("resized") == "2 tensors loaded, resized, ignored: 1 a number; 1 its optimiser"
    alone = sort_keys({"net": {"a": torch.ones(1)}}, rules, source="w.pth", system="X")
    assert alone.account() == "1 tensors loaded, none ignored"
    assert flatten({"a": {"b": torch.ones(1), "c": 3}, "d": {"e": 1}}).keys() == {"a.b", "a.c", "d"}
