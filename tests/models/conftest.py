from dataclasses import replace
from typing import Any

import pytest

from crisp.config import ModelConfig, RegionConfig, ViewsConfig

VIEWS = ViewsConfig(reference_px=64, global_px=64, local_px=32, local_views=3)
MODEL = ModelConfig(
    arch="vit_tiny_patch16_224",
    embed_dim=32,
    depth=2,
    num_heads=2,
    drop_path=0.0,
    head_hidden=48,
    head_bottleneck=16,
    prototypes=64,
)
REGION = RegionConfig(blocks=2)


class Configs:
    """The small model's configs, with changes: `configs.model(shared_norm=True)`."""

    views = VIEWS

    def model(self, **changes: Any) -> ModelConfig:
        return replace(MODEL, **changes)

    def region(self, **changes: Any) -> RegionConfig:
        return replace(REGION, **changes)


@pytest.fixture
def configs() -> Configs:
    return Configs()
