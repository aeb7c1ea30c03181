"""Runs as 'crisp train' leaves them, of a tiny model in which no weight is 0 or 1: those would hide mistakes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crisp.checkpoint import save_checkpoint
from crisp.config import ModelConfig, RegionConfig
from crisp.models.student_teacher import StudentTeacher
from crisp.recipes import demo
from crisp.runs import CHECKPOINTS, create_run

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run of two checkpoints, 4×4 patches, with changes to its model: `make_run(shared_norm=True)`."""

    def make(name: str = "run", *, patch_px: int = 16, **changes: Any) -> Path:
        model = {
            "arch": "vit_tiny_patch16_224", "embed_dim": 32, "depth": 2, "num_heads": 4,
            "head_hidden": 32, "head_bottleneck": 16, "prototypes": 32,
        } | changes  # fmt: skip
        base = demo()
        config = replace(
            base,
            out=tmp_path / name,
            views=replace(
                base.views, patch_px=patch_px, reference_px=4 * patch_px, global_px=4 * patch_px, local_px=2 * patch_px
            ),
            model=ModelConfig(**model),
            region=RegionConfig(blocks=1),
        )
        create_run(config)
        for step in (1, 2):
            torch.manual_seed(step)
            pair = StudentTeacher(config.model, config.region, config.views)
            for parameter in pair.parameters():
                parameter.data = 0.2 * torch.randn_like(parameter)
            content = {name: getattr(pair, name).state_dict(keep_vars=True) for name in ("student", "teacher")}
            save_checkpoint(config.run_folder / CHECKPOINTS, content, {}, step=step, doomed=lambda steps: steps[:-2])
        return config.run_folder

    return make
