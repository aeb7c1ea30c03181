"""The work: regions of every image, found and random, measured and kept on disk; then their means.

Axes: B images, K regions of each, G settings, W warp modes, 3 kinds of regions, 7 measures.
"""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crisp.config import to_json
from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.images import normalised
from crisp.evals.region_quality.config import RegionQualityConfig
from crisp.evals.region_quality.data import MaskedImages, open_masked
from crisp.evals.region_quality.discovery import Discovery, Setting, discovery_tokens, plan_discovery
from crisp.evals.region_quality.measures import (
    MEASURES,
    UNDEFINED,
    SeedSegments,
    Segments,
    measure,
    seed_segments,
    segments_of,
)
from crisp.evals.region_quality.random_regions import blob_regions, scattered_regions
from crisp.evals.region_quality.scores import KINDS, Outcome, scores_of
from crisp.evals.results import ModelFacts, Result
from crisp.evals.running import from_main
from crisp.evals.segmentation.extraction import forward_precision
from crisp.evals.segmentation.patches import prepare_image
from crisp.evals.segmentation.truth import Truth, load_truth
from crisp.evals.store import FeatureStore, Field
from crisp.models.frozen import FrozenModel
from crisp.pipelines.plan import make_plan
from crisp.regions import discover_regions, visible_in_both, warp_regions

log = logging.getLogger(__name__)

TASK = "region-quality"


def evaluate_region_quality(config: RegionQualityConfig, model: FrozenModel, world: World) -> Result:
    """Hold a model's regions against true segments, and random regions beside them. Collective.

    Args:
        config: its `out` and `device` are not looked at.
        model: on the device of `world`.
        world: this rank's.

    Returns:
        Percentages, the means over all regions for which a measure is defined. Those of discovered regions with the
        run's own settings come first. A score's settings say which regions (`KINDS`), β, M, the seed policy and, for
        `valid`, the warp mode. `purity-gain` and `overlap-gain` are means over images of the difference to connected
        random regions, and their `std` is the standard error of that mean.

    Raises:
        CrispError: whatever of data and config does not fit together, found before the model runs.
    """
    images = from_main(world, lambda: open_masked(config))
    discovery = plan_discovery(config, model.backbone)
    truth = load_truth(
        images.split, images.data, side_px=discovery.views.reference_px, patch_px=discovery.views.patch_px,
        store=FeatureStore(config.cache), threads=config.threads, world=world,
    )  # fmt: skip
    _check_segments(images, truth)
    tolerance_px = discovery.views.patch_px // 2 if config.boundary_px is None else config.boundary_px
    work = _Work(config, model, images, truth, discovery, tolerance_px, world)
    outcome = work.outcome()
    return Result(
        task=TASK,
        dataset=images.slug,
        model=ModelFacts.of(model),
        scores=list(scores_of(outcome, discovery)),
        settings={
            "images": len(images.split),
            "files": images.split.fingerprint,
            "ignored": list(images.data.labels.ignored),
            "seeds_per_image": config.seeds_per_image,
            "regions": len(images.split) * config.seeds_per_image,
            "regions_of_a_segment": int((outcome.measures[:, 0, 0, :, 0] != UNDEFINED).sum()),
            "seed": config.seed,
            "precision": config.precision,
            "boundary_px": tolerance_px,
            "reference_px": discovery.views.reference_px,
            "global_px": discovery.views.global_px,
            "min_patches": discovery.region.min_patches,
            "block_norm": discovery.region.block_norm,
        },
    )


def _check_segments(images: MaskedImages, truth: Truth) -> None:
    """Raise CrispError where there is nothing to tell apart: each region would be pure."""
    held = set(np.flatnonzero(truth.held.any(axis=0)).tolist())
    counted = held - set(images.data.labels.ignored)
    if len(counted) < 2:
        raise CrispError(
            f"{images.data.root}: its masks hold the labels {sorted(held)}, of which {sorted(held - counted)} are "
            f"ignored; there is nothing to tell apart: check --masks, and --ignored (none: '--ignored' alone)"
        )


class _Work:
    """What is computed for each image."""

    def __init__(
        self,
        config: RegionQualityConfig,
        model: FrozenModel,
        images: MaskedImages,
        truth: Truth,
        discovery: Discovery,
        tolerance_px: int,
        world: World,
    ) -> None:
        self._config, self._model, self._images, self._truth = config, model, images, truth
        self._discovery, self._tolerance_px, self._world = discovery, tolerance_px, world

    def outcome(self) -> Outcome:
        """All images', from the store where they are there. Collective."""
        config, discovery, kinds = self._config, self._discovery, len(KINDS)
        settings, modes, each = len(discovery.settings), len(discovery.warp_modes), config.seeds_per_image
        arrays = FeatureStore(config.cache).arrays(
            {
                "what": "measures of regions",
                "measures": list(MEASURES),
                "weights": self._model.fingerprint,
                "data": self._images.split.fingerprint,
                "ignored": list(self._images.data.labels.ignored),
                "settings": [asdict(setting) for setting in discovery.settings],
                "warp_modes": list(discovery.warp_modes),
                "region": {
                    name: getattr(discovery.region, name) for name in ("block_norm", "min_coverage", "min_patches")
                },
                "views": to_json(discovery.views),
                "seed": config.seed,
                "boundary_px": self._tolerance_px,
                "precision": config.precision,
            },
            len(self._images.split),
            {
                "measures": Field((kinds, settings, each, len(MEASURES)), "float32"),
                "valid": Field((kinds, settings, modes, each), "uint8"),
            },
            self._compute,
            chunk=2 * config.batch,
            world=self._world,
            title=f"{self._images.data.name}: regions of {self._model.name}",
        )
        return Outcome(measures=arrays["measures"], valid=arrays["valid"])

    def _compute(self, items: range) -> Mapping[str, NDArray[Any]]:
        parts = [self._batch(numbers, pixels, sizes) for numbers, pixels, sizes in self._batches(items)]
        measures, valid = zip(*parts, strict=True)
        return {"measures": np.concatenate(measures), "valid": np.concatenate(valid)}

    def _batches(self, items: range) -> Iterator[tuple[range, Tensor, NDArray[np.int64]]]:
        """Numbers, pixels [B, H, W, 3] uint8 and sizes [B, 2] (width, height); the next is read meanwhile."""
        side_px = self._discovery.views.reference_px

        def load(item: int) -> tuple[Tensor, tuple[int, int]]:
            path = self._images.split.pairs[item].image
            pixels = torch.from_numpy(prepare_image(path, side_px).copy())
            with Image.open(path) as image:
                return pixels, image.size

        step = self._config.batch
        with ThreadPoolExecutor(self._config.threads) as pool:
            coming = pool.map(load, items[:step])
            for start in range(0, len(items), step):
                loaded, coming = coming, pool.map(load, items[start + step : start + 2 * step])
                pixels, sizes = zip(*loaded, strict=True)
                yield items[start : start + step], torch.stack(pixels), np.array(sizes, np.int64)

    @torch.no_grad()
    def _batch(
        self, numbers: range, pixels: Tensor, sizes_px: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Measures [B, 3, G, K, 7] and validity [B, 3, G, W, K] of some images."""
        discovery, backbone, device = self._discovery, self._model.backbone, self._world.device
        normal = normalised(pixels, mean=backbone.mean, std=backbone.std, device=device)
        blocks = sorted({setting.blocks for setting in discovery.settings})
        with forward_precision(self._config, device):
            tokens = discovery_tokens(backbone, normal, blocks, block_norm=discovery.region.block_norm)
        rows = slice(numbers.start, numbers.stop)
        segments = segments_of(
            torch.from_numpy(np.array(self._truth.pixels[rows])).to(device),
            torch.from_numpy(np.array(self._truth.modes[rows])).to(device),
            ignored=self._images.data.labels.ignored,
        )
        draws = np.stack([self._draws(number) for number in numbers])  # [B, 2, K, N]
        measures: list[Tensor] = []
        valid: list[Tensor] = []
        drawn = {
            policy: self._seeds(policy, numbers, sizes_px, segments)
            for policy in dict.fromkeys(setting.seed_policy for setting in discovery.settings)
        }
        for setting in discovery.settings:
            seeds, affines, truth = drawn[setting.seed_policy]
            for regions in self._kinds(tokens[setting.blocks], seeds, setting, draws):
                measures.append(
                    measure(
                        regions, truth, segments, patch_px=discovery.views.patch_px, tolerance_px=self._tolerance_px
                    )
                )
                valid.append(self._valid(regions, affines))
        shape = (len(discovery.settings), len(KINDS))
        return (
            torch.stack(measures).unflatten(0, shape).permute(2, 1, 0, 3, 4).cpu().numpy(),
            torch.stack(valid).unflatten(0, shape).permute(3, 1, 0, 2, 4).to(torch.uint8).cpu().numpy(),
        )

    def _draws(self, number: int) -> NDArray[np.float64]:
        """[2, K, N] of an image, whatever else is in the batch; the same for all settings, so that they compare."""
        views = self._discovery.views
        shape = (2, views.seeds_per_image, views.reference_grid**2)
        return np.random.default_rng((self._config.seed, number)).random(shape)

    def _seeds(
        self, policy: Any, numbers: range, sizes_px: NDArray[np.int64], segments: Segments
    ) -> tuple[Tensor, Tensor, SeedSegments]:
        """Seeds [B, K], affines [2, B, 2, 3] of the global views, and the seeds' segments: the plan of training."""
        plan = make_plan(
            self._discovery.views_of(policy),
            seed=self._config.seed,
            epoch=0,
            sample_id=np.asarray(numbers, np.int64),
            height_px=sizes_px[:, 1],
            width_px=sizes_px[:, 0],
        )
        device = self._world.device
        seeds = torch.from_numpy(plan.region_seed).to(device)
        affines = torch.from_numpy(plan.view_from_reference[:2]).to(device)
        return seeds, affines, seed_segments(segments, seeds, tolerance_px=self._tolerance_px)

    def _kinds(self, tokens: Tensor, seeds: Tensor, setting: Setting, draws: NDArray[np.float64]) -> Iterator[Tensor]:
        """Regions [B, K, N] of each kind."""
        found = discover_regions(tokens, seeds, threshold=setting.threshold)
        yield found
        sizes, where = found.sum(-1).cpu().numpy(), seeds.cpu().numpy()
        grid = self._discovery.views.reference_grid
        yield torch.from_numpy(blob_regions(where, sizes, draws[:, 0], grid=grid)).to(found.device)
        yield torch.from_numpy(scattered_regions(where, sizes, draws[:, 1])).to(found.device)

    def _valid(self, regions: Tensor, affines: Tensor) -> Tensor:
        """[W, B, K] bool."""
        discovery = self._discovery
        return torch.stack(
            [
                visible_in_both(
                    warp_regions(
                        regions,
                        affines,
                        reference_grid=discovery.views.reference_grid,
                        view_grid=discovery.views.global_grid,
                        patch_px=discovery.views.patch_px,
                        mode=mode,
                        min_coverage=discovery.region.min_coverage,
                    ),
                    min_patches=discovery.region.min_patches,
                )
                for mode in discovery.warp_modes
            ]
        )
