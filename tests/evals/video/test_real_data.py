"""On real clips, with a small ViT of timm's and random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from crisp.distributed import World
from crisp.evals.video.checks import check_data
from crisp.evals.video.command import evaluate_video, list_data
from crisp.evals.video.config import VideoConfig
from crisp.evals.video.masks import read_mask
from crisp.evals.video.measures import contour_accuracy, region_similarity
from crisp.evals.video.propagation import propagate
from crisp.evals.video.segmenting import Extractor
from crisp.models.frozen import BlockTokens, FrozenBackbone, FrozenModel
from tests.evals.video.plain import plain_f, plain_j

ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))


class TimmBackbone(FrozenBackbone):
    def __init__(self) -> None:
        super().__init__()
        self.dim, self.depth, self.patch_px, self.native_px = 48, 4, 16, 224
        self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.vit = timm.create_model(
                "vit_tiny_patch16_224", embed_dim=self.dim, depth=self.depth, num_classes=0, dynamic_img_size=True
            )
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        blocks = self.vit.forward_intermediates(
            images, indices=last, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return [BlockTokens(cls=None, patches=patches) for patches in blocks]


def random_vit() -> FrozenModel:
    return FrozenModel(backbone=TimmBackbone(), name="random ViT", source="", fingerprint="random", account="")


def first_frames(source: Path, target: Path, names: list[str], count: int) -> Path:
    """DAVIS with the first frames of some sequences, by links."""
    for kind in ("JPEGImages", "Annotations"):
        for name in names:
            folder = target / kind / "480p" / name
            folder.mkdir(parents=True)
            for path in sorted((source / kind / "480p" / name).iterdir())[:count]:
                (folder / path.name).symlink_to(path)
    return target


def folder_of(test_data: Path, name: str) -> Path:
    folder = test_data / name
    if not folder.is_dir():
        pytest.skip(f"{folder}: not there")
    return folder


def test_davis2016(test_data: Path, tmp_path: Path) -> None:
    names = ["car-shadow", "libby"]
    root = first_frames(folder_of(test_data, "davis2016"), tmp_path / "davis", names, 4)
    config = VideoConfig(
        weights="random", data=root, out=tmp_path / "out", dataset="davis2016", split="all", device="cpu", threads=2
    )
    result = evaluate_video(config, random_vit(), ALONE)
    assert result.settings["objects"] == 2
    scores = {metric: score.value for metric, score in result.headline().items()}
    # a few frames on, colours and places still tell the object, up to its patches
    assert 40 < scores["J"] < 100
    assert 30 < scores["F"] < 100
    (masks,) = config.out.glob("*/masks")
    truth = read_mask(root / "Annotations/480p/libby/00002.png", single_object=True) == 1
    predicted = read_mask(masks / "libby/00002.png") == 1
    assert region_similarity(truth, predicted) == pytest.approx(plain_j(truth, predicted), abs=1e-12)
    assert contour_accuracy(truth, predicted) == pytest.approx(plain_f(truth, predicted), abs=1e-12)


def whole_form(target: Tensor, context: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The protocol with the whole affinity matrix: [T·h·w sources, h·w targets]."""
    height, width, _ = target.shape
    row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    near = ((row[:, None] - row).abs() <= 12) & ((column[:, None] - column).abs() <= 12)
    sources = torch.cat([features.flatten(0, 1) for features, _ in context])
    affinity = torch.exp(F.normalize(sources, dim=1) @ F.normalize(target.flatten(0, 1), dim=1).T / 0.1)
    affinity *= near.repeat(len(context), 1)
    fifth = affinity.sort(dim=0, descending=True).values[4]
    affinity[affinity < fifth] = 0
    affinity /= affinity.sum(0)
    return (torch.cat([soft.flatten(1) for _, soft in context], dim=1) @ affinity).unflatten(1, (height, width))


def test_cutie_bike(test_data: Path, tmp_path: Path) -> None:
    """Its whole clip; the fast form equals the whole one on its features."""
    root = folder_of(test_data, "cutie-bike")
    config = VideoConfig(weights="random", data=root, out=tmp_path, dataset="folder", device="cpu", threads=2)
    model = random_vit()
    assert evaluate_video(config, model, ALONE).scores == []
    (masks,) = tmp_path.glob("*/masks/cutie-bike")
    for path in sorted(masks.iterdir()):
        assert set(np.unique(read_mask(path)).tolist()) == {0, 1, 2}
    data = list_data(config)
    facts = check_data(data, threads=1)["cutie-bike"]
    assert (facts.height_px, facts.width_px, dict(facts.objects)) == (480, 854, {1: 0, 2: 0})
    extractor = Extractor(
        backbone=model.backbone, device=ALONE.device, size="480p", layers=4, mean=model.backbone.mean,
        std=model.backbone.std, batch=4, threads=1, autocast=lambda: torch.autocast("cpu", enabled=False),
    )  # fmt: skip
    features = [f.double() for f in extractor.features(data.sequences[0].frames, 480, 854)]
    assert features[0].shape == (30, 52, 48)
    soft = [frame[0].values for frame in propagate(features, {0: read_mask(root / "masks/00000.png")})]
    context: list[Any] = [(features[0], soft[0])]
    for feature, labels in zip(features[1:], soft[1:], strict=True):
        torch.testing.assert_close(labels, whole_form(feature, context))
        context.append((feature, labels))
