"""Pictures of a few fixed images while the run goes on, so that its beginning can be held against its end.

RUN/pictures/step-N/regions.png has the regions (paper, Figures 12 and 13), pca.png the principal components (Figure
4), and RUN/pictures/index.json lists them. Images, crops and seeds are the same each time. Nothing of the run is
changed: no draw is made from torch's generators, and the teacher is only read. Every rank calls it equally often, so
that it may be sharded over them; the main rank draws.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crisp.batch import Batch
from crisp.config import TrainConfig, ViewsConfig
from crisp.distributed import World, gather_over_ranks
from crisp.errors import CrispError
from crisp.pipelines.cpu import CpuRenderer
from crisp.pipelines.decode import Decoder
from crisp.pipelines.loader import open_shard_set
from crisp.pipelines.plan import make_plan
from crisp.pipelines.shards import ShardSet
from crisp.pipelines.source import Work
from crisp.runs import PICTURES, PICTURES_INDEX
from crisp.training.state import TrainState
from crisp.training.step import autocast, find_regions
from crisp.viz.components import principal_components
from crisp.viz.figure import new_figure, save_figure
from crisp.viz.pca import ComponentMap, draw_pca_pairs
from crisp.viz.region_figure import RegionPictures, denormalise, region_rows

log = logging.getLogger(__name__)

_NEIGHBOURS = 8
"""Samples tried in place of one that cannot be decoded"""
_DPI = 120


class RunPictures:
    """The images, rendered once, and the steps drawn so far.

    Args:
        config: of the run, with `pictures.every_epochs` set.
        world: this rank's.

    Raises:
        CrispError: matplotlib is missing, shards that cannot be read, or none of their images can be decoded.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        new_figure(1, 1)  # what is missing is said now, not after hours
        pictures, views = config.pictures, replace(config.views, local_views=0, seeds_per_image=1)
        self._config, self._world = config, world
        self.drawn: set[int] = set()
        """Steps"""
        source = pictures.shards or config.data.shards
        shards = open_shard_set(replace(config, data=replace(config.data, shards=source)))
        sample_ids = _readable(shards, pictures.images)
        self._batch = _render(shards, sample_ids, views, seed=config.seed)
        large = replace(views, reference_px=pictures.pca_px)
        self._large = _render(shards, sample_ids, large, seed=config.seed).reference
        if world.is_main:
            log.info("pictures every %d epoch(s) of samples %s", pictures.every_epochs, sample_ids.tolist())

    def due(self, done: int, *, steps_per_epoch: int, steps: int) -> bool:
        """Whether to draw after this many steps: at the start, every n epochs and at the end, but never twice."""
        return done not in self.drawn and (
            done == steps or done % (self._config.pictures.every_epochs * steps_per_epoch) == 0
        )

    def restore(self, run: Path, step: int) -> None:
        """Take up the pictures of a resumed run up to its step; later ones come again. Called by every rank."""
        kept: list[int] = []
        if self._world.is_main:
            folder = run / PICTURES
            entries = _read_index(folder)
            for entry in entries:
                if entry["step"] > step:
                    shutil.rmtree(folder / _name(entry["step"]), ignore_errors=True)
            kept = [entry["step"] for entry in entries if entry["step"] <= step]
            if len(kept) < len(entries):
                _write_index(folder, [entry for entry in entries if entry["step"] <= step])
        self.drawn = set(gather_over_ranks(kept)[0])  # the main rank's: others may not see the folder

    @torch.no_grad()
    def draw(
        self, state: TrainState, run: Path, *, step: int, steps_per_epoch: int, still_going: Callable[[], None]
    ) -> None:
        """Have the teacher look at the images, and write both pictures and the index. Collective.

        A picture that cannot be drawn or written is logged, and training goes on.

        Args:
            state: of the run.
            run: its folder.
            step: steps done.
            steps_per_epoch: of the run.
            still_going: called after each image.
        """
        began_s = time.perf_counter()
        self.drawn.add(step)
        networks, device = state.networks, state.world.device
        with autocast(self._config.precision, device):
            regions = find_regions(networks, self._batch.to(device), self._config)
            still_going()
            tokens: list[Tensor] = []
            for image in self._large.split(1):
                tokens.append(networks.teacher.patch_tokens(image.to(device))[0].float().cpu())
                still_going()
        if not self._world.is_main:
            return
        epoch = step / steps_per_epoch
        found = RegionPictures(
            reference=denormalise(self._batch.reference),
            global_views=denormalise(self._batch.global_views),
            region=regions.reference[:, 0].cpu().numpy(),
            view_regions=regions.masks[:, :, 0].cpu().numpy(),
            seed=self._batch.region_seed[:, 0].numpy(),
            valid=regions.valid[:, 0].cpu().numpy(),
            patch_px=self._config.views.patch_px,
        )
        try:
            self._write(run / PICTURES, found, tokens, step=step, epoch=epoch)
        except (CrispError, OSError) as error:
            log.error("step %d: no pictures (%s); training goes on", step, error)
            return
        log.info("step %d: pictures in %s (%.1f s)", step, run / PICTURES / _name(step), time.perf_counter() - began_s)

    def _write(self, folder: Path, found: RegionPictures, tokens: list[Tensor], *, step: int, epoch: float) -> None:
        if not all(image.isfinite().all() for image in tokens):
            raise CrispError("the teacher's tokens are not finite")
        side = self._large.shape[-1] // self._config.views.patch_px
        maps = [ComponentMap(components=principal_components(t.numpy(), 3), grid=(side, side)) for t in tokens]
        name = _name(step)
        partial = folder / f".{name}.partial"
        with contextlib.ExitStack() as closing:
            closing.callback(shutil.rmtree, partial, ignore_errors=True)
            title = f"Regions of the teacher after {epoch:.4g} epochs (step {step})"
            save_figure(region_rows(found, title=title), partial / "regions.png", dpi=_DPI)
            save_figure(draw_pca_pairs(list(denormalise(self._large)), maps), partial / "pca.png", dpi=_DPI)
            shutil.rmtree(folder / name, ignore_errors=True)
            partial.rename(folder / name)
        entry = {"step": step, "epoch": epoch, "regions": f"{name}/regions.png", "pca": f"{name}/pca.png"}
        earlier = [line for line in _read_index(folder) if line["step"] < step]
        _write_index(folder, [*earlier, entry])


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _read_index(folder: Path) -> list[dict[str, Any]]:
    """Its entries; none where there is no index, or one that a crash or a user has spoiled."""
    try:
        entries = json.loads((folder / PICTURES_INDEX).read_text())
        return [entry for entry in entries if isinstance(entry["step"], int)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _write_index(folder: Path, entries: list[dict[str, Any]]) -> None:
    partial = folder / f".{PICTURES_INDEX}.partial"
    partial.write_text(json.dumps(entries, indent=1) + "\n")
    partial.replace(folder / PICTURES_INDEX)


def _readable(shards: ShardSet, count: int) -> NDArray[np.int64]:
    """Ids of images that can be decoded, evenly from the first to the last.

    Raises:
        CrispError: there are none.
    """
    decode, found = Decoder(), []
    for wanted in np.unique(np.linspace(0, len(shards) - 1, min(count, len(shards))).round().astype(np.int64)).tolist():
        for sample_id in range(wanted, min(len(shards), wanted + _NEIGHBOURS)):
            with contextlib.suppress(CrispError):
                decode(shards.read(sample_id))
                found.append(sample_id)
                break
    if not found:
        raise CrispError(f"pictures.shards: no image of {shards.folder} can be decoded; see 'crisp shard verify'")
    return np.unique(found)


def _render(shards: ShardSet, sample_ids: NDArray[np.int64], views: ViewsConfig, *, seed: int) -> Batch:
    """As the run's first epoch has them, on the host."""
    rows = shards.index[sample_ids]
    plan = make_plan(views, seed=seed, epoch=0, sample_id=sample_ids, height_px=rows["height"], width_px=rows["width"])
    work = Work(encoded=[shards.read(i) for i in sample_ids.tolist()], plan=plan, label=rows["label"].astype(np.int64))
    with contextlib.closing(CpuRenderer(views, threads=1)) as renderer:
        return renderer.render(work)
