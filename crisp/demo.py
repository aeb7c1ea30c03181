"""`crisp demo`: images → shards → loader → training → k-NN → pictures, small and in minutes.

It reads as a tour of the package: every stage calls what the other commands call.
"""

import contextlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from crisp.config import TrainConfig
from crisp.errors import CrispError
from crisp.recipes import recipe_named

if TYPE_CHECKING:
    from crisp.models.student_teacher import StudentTeacher

KNN_K = 10
DRAWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What the demo runs on and where it writes."""

    images: Path | None = None
    """Folder of your own photographs, each a class; default: those inside the scikit-image and scikit-learn wheels."""
    out: Path | None = None
    """Folder of the demo; default runs/demo, or the first of runs/demo-2, … that is free."""
    seed: int = 0
    """Seed of crops, weights and order."""
    epochs: int | None = None
    """Epochs of training; default: the recipe's."""
    bench: bool = True
    """Measure the loaders too."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise CrispError(f"seed={self.seed}: must be 0 or more")


def main(config: DemoConfig) -> None:
    """Run every stage and say where its results are.

    Raises:
        CrispError: photographs that cannot be used, or an out folder that is taken.
    """
    from crisp.viz.figure import new_figure

    new_figure(1, 1)  # what is missing for the pictures is said now, not after minutes
    out = _free_folder(config.out)
    run = _training_config(config, out)
    console = Console(highlight=False)
    began_s = time.perf_counter()
    console.rule(f"1  Photographs → crops → shards, in {out}")
    train_shards, test_shards = _write_shards(config, out, console)
    if config.bench:
        console.rule("2  Loaders: reference, 2 × 224² and 10 × 96² views of each image")
        _bench(train_shards, console)
    console.rule("3  Pre-training a tiny ViT")
    before = _knn(run, train_shards, test_shards)
    _train(run)
    after = _knn(run, train_shards, test_shards)
    _write_summary(out, before=before, after=after)
    console.rule("4  Pictures")
    from crisp.viz.losses import draw_losses

    draw_losses(out / "metrics.jsonl", out / "losses.png")
    _draw_regions(run, out / "regions.png")
    _explain(out, before=before, after=after, elapsed_s=time.perf_counter() - began_s, console=console)


def _free_folder(asked: Path | None) -> Path:
    if asked is not None:
        if asked.exists() and (not asked.is_dir() or any(asked.iterdir())):
            raise CrispError(f"{asked}: not empty; name another folder with --out, or remove it")
        return asked
    out, number = Path("runs/demo"), 1
    while out.exists() and any(out.iterdir()):
        number += 1
        out = Path(f"runs/demo-{number}")
    return out


def _write_shards(config: DemoConfig, out: Path, console: Console) -> tuple[Path, Path]:
    """Crops and shards of both splits; the shards' folders, train and test."""
    from crisp.demo_images import write_demo_images, write_own_images
    from crisp.shard_imagenet.command import main as shard
    from crisp.shard_imagenet.config import ShardConfig

    if config.images is None:
        write_demo_images(out / "images", seed=config.seed)
    else:
        _, passed_over = write_own_images(config.images, out / "images", seed=config.seed)
        for name, reason in passed_over.items():
            console.print(f"passed over {name}: {reason}", markup=False)
    folders = []
    for split in ("train", "test"):
        folders.append(out / "shards" / split)
        shard(ShardConfig(source=str(out / "images" / split), out=str(folders[-1])), console=console)
    return folders[0], folders[1]


def _bench(shards: Path, console: Console) -> None:
    from crisp.benchmarks.loader import LoaderBenchConfig, bench_loader
    from crisp.benchmarks.loader_table import results_table
    from crisp.pipelines.dali_extra import dali_available

    backends: tuple[str, ...] = ("cpu", "dali", "torchvision-pil")
    if not dali_available():
        backends = ("cpu", "torchvision-pil")
        console.print("DALI is not installed, so its renderer is left out (pip install 'crisp-ssl\\[cuda13]')")
    quick = LoaderBenchConfig(shards=shards, backends=backends, rounds=1, seconds=2, ceiling=False)
    console.print(results_table(bench_loader(quick)))


def _training_config(config: DemoConfig, out: Path) -> TrainConfig:
    from crisp.pipelines.dali_extra import dali_available

    base = recipe_named("demo")
    epochs = base.optim.epochs if config.epochs is None else config.epochs
    warmup_epochs = max(0, min(base.optim.warmup_epochs, epochs))
    return replace(
        base,
        out=out,
        seed=config.seed,
        optim=replace(base.optim, epochs=epochs, warmup_epochs=warmup_epochs),
        pictures=replace(base.pictures, every_epochs=max(1, epochs // 4), pca_px=2 * base.views.reference_px),
        data=replace(base.data, shards=str(out / "shards" / "train"), renderer="auto" if dali_available() else "cpu"),
    )


def _train(run: TrainConfig) -> None:
    from crisp.trainer import train

    train(run)


def _networks(run: TrainConfig) -> "StudentTeacher":
    """The run's networks with the teacher of its newest checkpoint, or as they begin."""
    import torch

    from crisp.checkpoint import list_checkpoints, load_module_state, load_weights
    from crisp.models.student_teacher import build_student_teacher

    torch.manual_seed(run.seed)
    networks = build_student_teacher(run, torch.device("cpu")).eval()
    checkpoints = list_checkpoints(run.run_folder / "checkpoints")
    if checkpoints:
        load_weights(networks.teacher, load_module_state(checkpoints[-1], "teacher"), source=checkpoints[-1])
    return networks


def _knn(run: TrainConfig, train_shards: Path, test_shards: Path) -> float:
    """k-NN accuracy of the teacher's [CLS] token."""
    from crisp.evals.features import extract_features
    from crisp.evals.knn import knn_accuracy
    from crisp.pipelines.shards import ShardSet

    backbone = _networks(run).teacher.backbone
    train, test = ShardSet(train_shards), ShardSet(test_shards)
    side = run.views.global_px
    (train_x, train_y), (test_x, test_y) = (
        extract_features(backbone.forward_cls, shards, resize_px=round(side * 256 / 224), crop_px=side)
        for shards in (train, test)
    )
    accuracy = knn_accuracy(train_x, train_y, test_x, test_y, k=(KNN_K,), classes=len(train.manifest.classes))
    return accuracy[KNN_K]


def _draw_regions(run: TrainConfig, target: Path) -> None:
    """The first samples of the run as the trained teacher sees them."""
    import torch

    from crisp.pipelines.loader import build_train_loader
    from crisp.training.step import find_regions
    from crisp.viz.region_figure import RegionPictures, denormalise, draw_regions

    loader = build_train_loader(run, rank=0, world_size=1, device=torch.device("cpu"))
    with contextlib.closing(loader):
        batch = next(iter(loader))
    regions = find_regions(_networks(run), batch, run)
    pictures = RegionPictures(
        reference=denormalise(batch.reference[:DRAWN]),
        global_views=denormalise(batch.global_views[:, :DRAWN]),
        region=regions.reference[:DRAWN, 0].numpy(),
        view_regions=regions.masks[:, :DRAWN, 0].numpy(),
        seed=batch.region_seed[:DRAWN, 0].numpy(),
        valid=regions.valid[:DRAWN, 0].numpy(),
        patch_px=run.views.patch_px,
    )
    draw_regions(pictures, target, title="Regions that the trained teacher finds, and where both views show them")


def _write_summary(out: Path, *, before: float, after: float) -> None:
    summary = {"knn_k": KNN_K, "knn_before": before, "knn_after": after}
    (out / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")


def _explain(out: Path, *, before: float, after: float, elapsed_s: float, console: Console) -> None:
    from crisp.metrics import read_metrics

    lines = read_metrics(out / "metrics.jsonl")
    first, last = lines[0]["loss"], lines[-1]["loss"]
    console.rule(f"Done in {elapsed_s / 60:.1f} minutes")
    figures = Table(show_header=True, box=None, pad_edge=False)
    for column in ("", "before", "after"):
        figures.add_column(column, justify="left" if not column else "right")
    figures.add_row(f"k-NN accuracy on unseen halves (k = {KNN_K})", f"{before:.1%}", f"{after:.1%}")
    figures.add_row("total loss", f"{first:.2f}", f"{last:.2f}")
    console.print(figures)
    console.print()
    for name, meaning in (
        ("images/", "the crops: training from the left half of each photograph, test from the right"),
        ("shards/", "WebDataset shards of both, with their index"),
        ("config.json", "every choice of the run"),
        ("metrics.jsonl", "losses, learning rate, img/s, data wait; also in tensorboard/"),
        ("checkpoints/", "the trained networks, two newest"),
        ("losses.png", "the total loss and its three terms"),
        ("pictures/", "regions and principal components of eight images over time, by step"),
        ("regions.png", "reference with seed (blue) and region (red); the region in both views"),
    ):
        console.print(f"  {out / name}", markup=False, soft_wrap=True)
        console.print(Padding(Text(meaning), (0, 0, 0, 6)))
