"""Folders of runs as training leaves them, made without training."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crisp.evals.results import ModelFacts, Result, Score, write_result
from crisp.machine import note_start
from crisp.pipelines.faults import Replacement
from crisp.recipes import recipe_named
from crisp.run_state import RunState, write_state
from crisp.runs import create_run

EVIL = "<script>alert('crisp')</script>"


def line(step: int, **values: Any) -> dict[str, Any]:
    """One of metrics.jsonl."""
    return {
        "step": step, "epoch": step // 100, "loss": 12 - step / 100, "loss_cls": 5.0, "loss_patch": 4.0,
        "loss_region": 3 - step / 100, "region_valid_frac": 0.5, "regions_valid": 16.0, "region_patches_view1": 9.0,
        "region_patches_view2": 8.0, "gradient_norm": 2.5, "learning_rate": 1e-3, "weight_decay": 0.04,
        "ema_momentum": 0.996, "teacher_temperature": 0.04, "step_s": 0.5, "images_per_s": 64.0, "data_wait_s": 0.01,
        "data_wait_share": 0.02, "samples_replaced": 0, "steps_skipped": 0, "teacher_entropy_cls": 0.7,
        "center_norm_cls": 1.5, **values,
    }  # fmt: skip


def bare_run(folder: Path, *, threshold: float = 0.75) -> Path:
    """A run of which nothing is there but its config: as early as a report can be asked for."""
    demo = recipe_named("demo")
    create_run(replace(demo, out=folder, region=replace(demo.region, threshold=threshold)))
    return folder


def full_run(folder: Path, *, threshold: float = 0.75, steps: int = 120) -> Path:
    """A run that has everything, and names that are HTML wherever a name can come from outside."""
    bare_run(folder, threshold=threshold)
    write_lines(folder / "metrics.jsonl", [line(step, steps_skipped=step // 50) for step in range(10, steps + 1, 10)])
    write_lines(folder / "knn.jsonl", [{"step": s, "epoch": 0, "top1": s / 500, "k": 20} for s in (60, 120)])
    state = RunState(state="failed", steps=200, host="host-of-nobody", pid=1, began_ticks=0, reason=f"fell over {EVIL}")
    write_state(folder, state)
    for step in (0, 60):
        note_start(folder, step=step, ranks=2, nodes=1, device="cpu")
    (folder / "faults").mkdir()
    fault = Replacement(
        step=7, epoch=0, asked_id=3, shown_id=4, failed_id=3, kind="decode", shard=f"{EVIL}.tar", key=EVIL, reason=EVIL
    )
    write_lines(folder / "faults" / "rank-00000.jsonl", [asdict(fault), asdict(replace(fault, step=17))])
    (folder / "checkpoints" / ".damaged-step-00000060").mkdir(parents=True)
    draw_pictures(folder, steps=(60, 120))
    quality = {"purity": 61.0, "size": 20.0}
    lines = [
        {"dataset": EVIL, "step": step, "epoch": 1.0, "found": quality, "blob": {"purity": 50.0}, "scattered": {}}
        for step in (60, 120)
    ]
    (folder / "region_quality.json").write_text(json.dumps(lines))
    write_result(folder / "evals", result(f"CRISP {EVIL} step 120", source=str(folder)))
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))


def draw_pictures(run: Path, *, steps: tuple[int, ...], width_px: int = 60) -> None:
    """Noise, which is as large a picture as there can be, and the index of it."""
    rng = np.random.default_rng(0)
    index = []
    for step in steps:
        folder = run / "pictures" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for kind in ("regions", "pca"):
            Image.fromarray(rng.integers(0, 256, (width_px // 2, width_px, 3), np.uint8)).save(folder / f"{kind}.png")
        files = {kind: f"{folder.name}/{kind}.png" for kind in ("regions", "pca")}
        index.append({"step": step, "epoch": step / 60, **files})
    (run / "pictures" / "index.json").write_text(json.dumps(index))


def result(name: str, *, source: str, task: str = "seg-knn", dataset: str = "ade20k", value: float = 28.0) -> Result:
    facts = ModelFacts(name=name, source=source, fingerprint="f" * 64, dim=96, depth=2, patch_px=16)
    scores = [Score(metric="mIoU", value=value, settings={"k": 3})]
    return Result(
        task=task, dataset=dataset, model=facts, scores=scores, settings={"note": "of a test"}, chosen={"k": 3}
    )
