"""The layouts of real data sets, and that their segments are told from chance by a model that only knows colours."""

from pathlib import Path
from typing import Any

import pytest
import torch

from crisp.distributed import World
from crisp.evals.region_quality.config import RegionQualityConfig
from crisp.evals.region_quality.data import open_masked
from crisp.evals.region_quality.evaluate import evaluate_region_quality
from tests.evals.tiny_backbone import tiny_model

ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "camvid": ({"images": "val", "masks": "valannot", "ignored": (11,)}, 9),
    "davis2016": ({"images": "JPEGImages/480p", "masks": "Annotations/480p", "ignored": ()}, 179),
    "coco128": ({"images": "images/val2017", "masks": "semantic/val2017", "ignored": (0,)}, 60),
    "ade20k-sample": ({"images": "images", "masks": "annotations", "ignored": (0,)}, 3),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, test_data: Path) -> None:
    options, count = LAYOUTS[name]
    found = open_masked(RegionQualityConfig(weights="w", data=test_data / name, **options))
    assert len(found.split) == count
    assert found.slug == name


def test_a_model_of_colours_beats_random_patches(test_data: Path, tmp_path: Path) -> None:
    config = RegionQualityConfig(
        weights="tiny:", data=test_data / "camvid", cache=tmp_path, max_images=4, thresholds=(0.9,), seeds_per_image=4,
        **LAYOUTS["camvid"][0],
    )  # fmt: skip
    result = evaluate_region_quality(config, tiny_model(), ALONE)
    purity = {s.settings["regions"]: s.value for s in result.scores if s.metric == "purity"}
    assert purity["found"] > purity["scattered"]
    assert result.settings["reference_px"] == 224
    assert 0 < result.settings["regions_of_a_segment"] <= 16
