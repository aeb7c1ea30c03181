"""Small things that pictures are made of: photographs, weights in files, a run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from crisp.trainer import train
from tests.test_trainer import shards, tiny

__all__ = ["shards"]  # a fixture


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory, photographs: dict[str, NDArray[np.uint8]]) -> Path:
    """Four photographs, none of them square."""
    folder = tmp_path_factory.mktemp("photos")
    for name, pixels in sorted(photographs.items())[:4]:
        Image.fromarray(pixels[:200, :300]).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Sources of tiny random models: `16` and `8` by their patches, made for 64 px; `no cls`."""
    folder, sources = tmp_path_factory.mktemp("weights"), {}
    for patch in (16, 8):
        torch.manual_seed(patch)
        vit = VisionTransformer(img_size=64, patch_size=patch, embed_dim=128, depth=2, num_heads=2, num_classes=0)
        for parameter in vit.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        torch.save(vit.state_dict(), folder / f"dino{patch}.pth")
        sources[str(patch)] = f"dino:{folder / f'dino{patch}.pth'}"
    state = {key: value for key, value in vit.state_dict().items() if key != "cls_token"}
    state["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save({"target_encoder": state}, folder / "ijepa.pth")
    sources["no cls"] = f"ijepa:{folder / 'ijepa.pth'}"
    return sources


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of nine steps in three epochs, with checkpoints of steps 6, 8 and 9; regions of the last two blocks."""
    config = tiny(shards, tmp_path_factory.mktemp("runs") / "tiny")
    return train(replace(config, keep_checkpoints=3))
