"""Pictures that a run draws of itself: they change nothing, come again after a resume, and ranks draw the same."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crisp.config import PicturesConfig, RegionConfig, TrainConfig
from crisp.distributed import World
from crisp.errors import CrispError
from crisp.pipelines.shards import ShardSet
from crisp.runs import CHECKPOINTS, PICTURES, PICTURES_INDEX
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from crisp.trainer import train
from crisp.training.pictures import RunPictures
from tests import ranks
from tests.test_trainer import STEPS, assert_identical, final_state, shards, tiny

__all__ = ["shards"]  # a fixture

pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")


def drawing(data: Path, run: Path, **changes: Any) -> TrainConfig:
    pictures = PicturesConfig(**({"every_epochs": 1, "images": 2, "pca_px": 96} | changes))
    return replace(tiny(data, run), pictures=pictures)


def index(run: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((run / PICTURES / PICTURES_INDEX).read_text())
    return entries


def pixels(run: Path, step: int, name: str) -> np.ndarray:
    return np.asarray(Image.open(run / PICTURES / f"step-{step:08d}" / f"{name}.png").convert("RGB"))


def test_they_are_drawn_from_start_to_end_and_change_no_weight(shards: Path, tmp_path: Path) -> None:
    without = train(tiny(shards, tmp_path / "without"))
    run = train(drawing(shards, tmp_path / "with"))
    assert_identical(final_state(run), final_state(without))
    assert not (without / PICTURES).exists()

    entries = index(run)
    assert [(entry["step"], entry["epoch"]) for entry in entries] == [(0, 0.0), (3, 1.0), (6, 2.0), (9, 3.0)]
    for entry in entries:
        for name in ("regions", "pca"):
            assert entry[name] == f"step-{entry['step']:08d}/{name}.png"
            assert (run / PICTURES / entry[name]).is_file()
    names = {path.name for path in (run / PICTURES).iterdir()}
    assert names == {PICTURES_INDEX} | {f"step-{step:08d}" for step in (0, 3, 6, 9)}, "nothing half written"
    first, last = pixels(run, 0, "pca"), pixels(run, STEPS, "pca")
    half = len(first) // 2
    assert (first[: half - 4] == last[: half - 4]).all(), "the images are the same"
    assert (first[half + 4 :] != last[half + 4 :]).any(), "the teacher is not"


def test_a_resumed_run_draws_again_what_comes_after_its_checkpoint(shards: Path, tmp_path: Path) -> None:
    run = train(replace(drawing(shards, tmp_path / "run"), keep_checkpoints=10))
    before = {step: pixels(run, step, "regions") for step in (3, 6, 9)}
    for step in (6, 8, 9):
        shutil.rmtree(run / CHECKPOINTS / f"step-{step:08d}")  # step 4 is left
    kept = run / PICTURES / "step-00000003" / "regions.png"
    stamp = kept.stat().st_mtime_ns
    train(drawing(shards, run), resume=True)
    assert [entry["step"] for entry in index(run)] == [0, 3, 6, 9]
    assert kept.stat().st_mtime_ns == stamp, "what was before it stays"
    for step, drawn in before.items():
        np.testing.assert_array_equal(pixels(run, step, "regions"), drawn)


def test_a_run_without_regions_has_pictures_too(shards: Path, tmp_path: Path) -> None:
    """Also if the config, whose regions are off, asks for more blocks than there are."""
    config = drawing(shards, tmp_path / "run", every_epochs=3)
    run = train(replace(config, region=RegionConfig(enabled=False, blocks=4)))
    assert [entry["step"] for entry in index(run)] == [0, 9]


def test_a_folder_that_cannot_be_written_stops_no_run(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = drawing(shards, tmp_path / "run", every_epochs=3)
    config.run_folder.mkdir()
    (config.run_folder / PICTURES).write_text("in the way")
    run = train(config)
    assert caplog.text.count("training goes on") == 2
    final_state(run)


def test_what_cannot_be_drawn_is_refused_before_the_run_begins(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(CrispError, match="nowhere"):
        train(drawing(shards, tmp_path / "run", shards=str(tmp_path / "nowhere")))
    with pytest.raises(CrispError, match=r"pictures\.pca_px=100: must be a multiple of views\.patch_px=16"):
        drawing(shards, tmp_path / "run", pca_px=100)
    with pytest.raises(CrispError, match=r"pictures\.images=0"):
        drawing(shards, tmp_path / "run", images=0)
    assert not (tmp_path / "run").exists()


def test_a_damaged_image_gives_way_to_its_neighbour(tmp_path: Path) -> None:
    """Its checksum is wrong: the next sample is shown."""
    for i in range(6):
        target = tmp_path / "images" / "class" / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 90, 3), np.uint8)).save(target)
    shard_imagenet(ShardConfig(source=str(tmp_path / "images"), out=str(tmp_path / "shards"), workers=1))
    world = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))
    whole = RunPictures(drawing(tmp_path / "shards", tmp_path / "run", images=3), world)
    assert whole._batch.sample_id.tolist() == [0, 2, 5]
    row = ShardSet(tmp_path / "shards").index[2]
    with next((tmp_path / "shards").glob("*.tar")).open("r+b") as file:
        file.seek(int(row["offset"]) + 40)
        file.write(b"damaged")
    other = RunPictures(drawing(tmp_path / "shards", tmp_path / "run", images=3), world)
    assert other._batch.sample_id.tolist() == [0, 3, 5]
    assert torch.equal(other._batch.reference[0], whole._batch.reference[0])


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(shards: Path, tmp_path: Path) -> None:
    """Replicated and sharded: at the start, where the weights are the same, bit for bit."""
    alone = train(drawing(shards, tmp_path / "alone", every_epochs=3))
    for parallel in ("ddp", "fsdp"):
        config = drawing(shards, tmp_path / parallel, every_epochs=3)
        outcomes = ranks.run(replace(config, parallel=parallel), 2)  # type: ignore[arg-type]
        assert [outcome.error for outcome in outcomes] == [None, None]
        assert index(config.run_folder) == index(alone)
        for name in ("regions", "pca"):
            np.testing.assert_array_equal(pixels(config.run_folder, 0, name), pixels(alone, 0, name))
