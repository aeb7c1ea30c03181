"""The commands of README and docs that can run here, run, in a folder that has what the pages speak of."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_docs import ROOT, typed_commands

PAGES = ("README.md", "docs/sharding.md", "docs/training.md", "docs/pictures.md", "docs/report.md", "docs/export.md")
FIRST = ("shard", "train", "viz", "export", "report", "runs")
"""Commands in the order in which each finds what it needs"""
STANDS_FOR = {"SOURCE": "data/imagenet", "OUT": "data/shards", "DIR": "data/shards/train", "runs/vitl16": "runs/vits16"}
LEFT_OUT = {
    "doctor": "tests/doctor runs it",
    "demo": "its parts are here; make demo is the whole",
    "ablate": "tests/ablate runs a table",
    "bench": "tests/benchmarks runs each",
    "eval": "tests/evals runs each on data in its official layout",
    "recipes": "tests/test_docs runs it",
    "train vitl16": "eight ranks and more; tests/test_scale.py has several",
    "--partition": "tests/shard_imagenet runs partitions",
    "--init.weights": "published weights cannot be downloaded here; tests/models reads files in their layouts",
    "timm:": "published weights cannot be downloaded here; tests/models/published reads files in their layouts",
    "onnx": "tests/export has it where onnx is installed",
    "runs/ibot_vits16": "a second run; tests/viz draws several",
    "runs/vits16_low_lr": "a second run; tests/report shows several",
    "--evals": "results of other runs; tests/report reads them",
    "--keys": "results of checkpoints; tests/viz draws them",
}
"""Commands with these words are not run, and why"""


def photograph(path: Path, seed: int) -> None:
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)


def prepare(folder: Path) -> None:
    for split, images in (("train", 48), ("val", 8)):
        for number in range(images):
            photograph(folder / "data/imagenet" / split / f"n{number % 4:08d}" / f"{split}{number}.JPEG", number)
    for number, name in enumerate(("cat1.jpg", "cat2.jpg", "photos/a.jpg", "photos/b.jpg")):
        photograph(folder / name, number)


def commands() -> list[list[str]]:
    """Each once, with a recipe of seconds in the place of the paper's."""
    found: list[list[str]] = []
    for page, typed in typed_commands():
        line = " ".join(typed)
        if str(page.relative_to(ROOT)) not in PAGES or any(text in line for text in LEFT_OUT):
            continue
        words = [STANDS_FOR.get(word, word.removeprefix("/") if word.startswith("/data/") else word) for word in typed]
        if words[:2] == ["train", "vits16"]:
            small = (
                "--data.renderer cpu --optim.epochs 2 --optim.warmup-epochs 1 --optim.global-batch 16 --out runs/vits16"
            )
            words = ["train", "demo", "--data.shards", "data/shards/train", *small.split()]
        if words not in found:
            found.append(words)
    return sorted(found, key=lambda words: FIRST.index(words[0]))


@pytest.mark.slow
def test_commands_of_the_pages_run_one_after_the_other(tmp_path: Path) -> None:
    prepare(tmp_path)
    for words in commands():
        ran = subprocess.run(
            [sys.executable, "-m", "crisp", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.returncode == 0, f"crisp {' '.join(words)}\n{ran.stderr[-2000:]}"
    assert {words[0] for words in commands()} == set(FIRST)
    for written in ("pairs.pdf", "regions.pdf", "views.png", "vits16-timm", "runs/vits16/report.html"):
        assert (tmp_path / written).exists(), written
