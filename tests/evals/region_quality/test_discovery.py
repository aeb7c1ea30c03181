"""Regions are those that training would discover with the same weights, images, views and seeds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crisp.batch import Batch
from crisp.checkpoint import save_checkpoint
from crisp.config import ModelConfig, RegionConfig, TrainConfig
from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.images import normalised
from crisp.evals.region_quality.config import RegionQualityConfig
from crisp.evals.region_quality.discovery import Setting, discovery_tokens, plan_discovery, run_of
from crisp.evals.region_quality.evaluate import evaluate_region_quality
from crisp.evals.region_quality.measures import MEASURES
from crisp.evals.region_quality.over_run import QUALITY_FILE, merged, score_checkpoints
from crisp.evals.segmentation.masks import read_mask
from crisp.evals.segmentation.patches import prepare_image, prepare_mask
from crisp.models.published import load_frozen
from crisp.models.student_teacher import StudentTeacher
from crisp.models.trained import load_trained
from crisp.pipelines.constants import IMAGENET_MEAN, IMAGENET_STD
from crisp.pipelines.plan import make_plan
from crisp.recipes import demo
from crisp.run_state import RecordedRun
from crisp.runs import CHECKPOINTS, create_run
from crisp.training.step import find_regions

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=CPU)
SEEDS = 3


@pytest.fixture
def run(tmp_path: Path) -> TrainConfig:
    """A run with checkpoints of steps 2 and 4, all parameters drawn."""
    base = demo()
    config = replace(
        base,
        out=tmp_path / "run",
        views=replace(base.views, reference_px=64, global_px=64, local_px=32, seeds_per_image=SEEDS),
        model=ModelConfig(
            arch="vit_tiny_patch16_224", embed_dim=32, depth=3, num_heads=4, head_hidden=32, head_bottleneck=16,
            prototypes=32,
        ),
        region=RegionConfig(blocks=2, threshold=0.95, min_patches=2, warp_mode="forward"),
        optim=replace(base.optim, epochs=8),
    )  # fmt: skip
    create_run(config)
    with RecordedRun(config.run_folder, steps=16):
        for step in (2, 4):
            torch.manual_seed(step)
            pair = StudentTeacher(config.model, config.region, config.views)
            for parameter in pair.parameters():
                parameter.data = 0.2 * torch.randn_like(parameter)
            content = {name: getattr(pair, name).state_dict(keep_vars=True) for name in ("student", "teacher")}
            save_checkpoint(config.run_folder / CHECKPOINTS, content, {}, step=step, doomed=lambda steps: steps[:-2])
    return config


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four photographs of noise in two tones, of different sizes, and their masks."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(70, 90), (64, 64), (100, 60), (80, 120)]):
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 :, : width // 2] = 1
        image = rng.integers(0, 120, (height, width, 3)) + 110 * mask[..., None]
        for folder, pixels in (("images", image.astype(np.uint8)), ("annotations", mask)):
            (tmp_path / "photos" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "photos" / folder / f"{number}.png")
    return tmp_path / "photos"


def quality_config(run: TrainConfig, data: Path, **options: Any) -> RegionQualityConfig:
    chosen = {"weights": str(run.run_folder), "cache": data.parent / "cache", "seeds_per_image": SEEDS, **options}
    return RegionQualityConfig(data=data, **chosen)


@pytest.mark.parametrize("norm", ["patch", "raw"])
def test_tokens_are_the_networks(run: TrainConfig, norm: Any) -> None:
    network = load_trained(run.run_folder).network
    backbone = load_frozen(str(run.run_folder), device=CPU).backbone
    images = torch.randn(2, 3, 64, 64)
    found = discovery_tokens(backbone, images, (1, 2, 3), block_norm=norm)
    for blocks, tokens in found.items():
        network.region_config = replace(run.region, blocks=blocks, block_norm=norm)
        assert torch.equal(tokens, network.discovery_tokens(images))


def test_settings_are_the_runs(run: TrainConfig, data: Path) -> None:
    model = load_frozen(str(run.run_folder), device=CPU)
    plan = plan_discovery(quality_config(run, data), model.backbone)
    assert plan.settings == (Setting(0.95, 2, "uniform"),)
    assert plan.warp_modes == ("forward",)
    assert plan.region == run.region
    assert replace(plan.views, local_views=run.views.local_views) == run.views
    assert run_of(str(run.run_folder / CHECKPOINTS / "step-00000002")) == run
    other = RegionQualityConfig(weights="timm:x", data=data)
    paper = plan_discovery(other, model.backbone)
    assert paper.settings == (Setting(0.75, 3, "uniform"),)  # M of 4, of three blocks
    assert (paper.views.reference_px, paper.region.min_patches) == (224, 4)


@pytest.mark.parametrize("policy", ["uniform", "visible"])
def test_regions_are_those_of_a_training_step(run: TrainConfig, data: Path, policy: Any) -> None:
    config = replace(run, seed=5, views=replace(run.views, seed_policy=policy))
    networks = StudentTeacher(config.model, config.region, config.views)
    networks.teacher.load_state_dict(load_trained(run.run_folder).network.state_dict())
    paths = sorted((data / "images").iterdir())
    sizes = [size_of(path) for path in paths]
    # With local views and masks, as a loader draws them.
    plan = make_plan(
        config.views, seed=5, epoch=0, sample_id=np.arange(4), height_px=[h for _, h in sizes],
        width_px=[w for w, _ in sizes],
    )  # fmt: skip
    pixels = torch.stack([torch.from_numpy(prepare_image(path, 64).copy()) for path in paths])
    reference = normalised(pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD, device=CPU)
    batch = Batch(
        reference=reference,
        global_views=reference.expand(2, -1, -1, -1, -1),
        local_views=reference[None, :, :, :32, :32],
        view_from_reference=torch.from_numpy(plan.view_from_reference),
        patch_masks=torch.from_numpy(plan.patch_masks),
        region_seed=torch.from_numpy(plan.region_seed),
        label=torch.zeros(4, dtype=torch.int64),
        sample_id=torch.arange(4),
    )
    regions = find_regions(networks, batch, config)

    model = load_frozen(str(run.run_folder), device=CPU)
    result = evaluate_region_quality(quality_config(run, data, seed=5, seed_policies=(policy,)), model, ALONE)
    ours = {s.metric: s.value for s in result.scores if s.settings["regions"] == "found"}
    assert ours["size"] == pytest.approx(100 * regions.reference.float().mean().item(), abs=1e-4)
    assert ours["valid"] == pytest.approx(100 * regions.valid.float().mean().item(), abs=1e-4)
    assert 0 < ours["valid"] < 100
    modes = np.stack([np.asarray(prepare_mask(read_mask(path), 64)) for path in masks_of(data)])
    labels = torch.from_numpy(modes.reshape(4, 4, 16, 4, 16).mean((2, 4)).reshape(4, 16) > 0.5)
    same = labels[:, None] == labels.gather(1, batch.region_seed)[..., None]
    purity = (regions.reference & same).sum(-1) / regions.reference.sum(-1)
    assert ours["purity"] == pytest.approx(100 * purity.mean().item(), abs=1e-4)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def masks_of(data: Path) -> list[Path]:
    return sorted((data / "annotations").iterdir())


def test_over_training(run: TrainConfig, data: Path) -> None:
    path = score_checkpoints(quality_config(run, data, thresholds=(0.3, 0.95)), ALONE)
    assert path == run.run_folder / QUALITY_FILE
    lines = json.loads(path.read_text())
    assert [(line["dataset"], line["step"], line["epoch"]) for line in lines] == [
        ("photos", 2, 1.0),
        ("photos", 4, 2.0),
    ]
    model = load_frozen(str(run.run_folder), device=CPU)
    own = evaluate_region_quality(quality_config(run, data), model, ALONE)
    for line in lines:
        assert (line["threshold"], line["blocks"], line["warp_mode"]) == (0.95, 2, "forward")
    for kind in ("found", "blob", "scattered"):
        scores = [s for s in own.scores if s.settings["regions"] == kind and not s.metric.endswith("-gain")]
        expected = {s.metric: round(s.value, 4) for s in scores}
        assert set(expected) == {*MEASURES, "valid"}
        assert lines[1][kind] == expected
    assert lines[0]["found"] != lines[1]["found"]
    before = path.read_text()
    score_checkpoints(quality_config(run, data), ALONE)
    assert path.read_text() == before  # not twice
    path.write_text("{")
    with pytest.raises(CrispError, match=r"region_quality\.json: cannot be read"):
        score_checkpoints(quality_config(run, data), ALONE)


def test_a_line_replaces_that_of_its_step_alone() -> None:
    lines = [{"dataset": "a", "step": 1, "x": 0}, {"dataset": "b", "step": 1, "x": 0}]
    assert merged(lines, {"dataset": "b", "step": 1, "x": 2}) == [lines[0], {"dataset": "b", "step": 1, "x": 2}]
    assert merged(lines, {"dataset": "a", "step": 0}) == [{"dataset": "a", "step": 0}, *lines]


def test_only_a_run_has_checkpoints(tmp_path: Path, data: Path) -> None:
    with pytest.raises(CrispError, match="not the folder of a run"):
        score_checkpoints(RegionQualityConfig(weights=str(tmp_path), data=data), ALONE)
