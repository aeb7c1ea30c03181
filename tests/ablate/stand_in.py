"""In place of `crisp train` and `crisp eval`: writes what they would, at once and without torch. Run as a script.

A row named in $STAND_IN_FAILS fails in training; each call is a line of $STAND_IN_CALLS.
"""

import json
import os
import sys
from pathlib import Path

from crisp.config import TrainConfig
from crisp.recipes import recipe_named
from crisp.run_state import RecordedRun
from crisp.runs import CONFIG_FILE, KNN_FILE, METRICS_FILE, create_run, read_run_config


def train(arguments: list[str]) -> None:
    import tyro

    resume = arguments[0] == "--resume"
    default = read_run_config(Path(arguments[1])) if resume else recipe_named(arguments[0])
    config = tyro.cli(TrainConfig, default=default, args=arguments[2 if resume else 1 :])
    run = config.run_folder
    if not (run / CONFIG_FILE).exists():
        create_run(config)
    if run.name in os.environ.get("STAND_IN_FAILS", "").split():
        print(f"crisp train: {run.name}: the disk is full; free some space")
        raise SystemExit(1)
    with RecordedRun(run, steps=3):
        shares = [{"step": step, "region_valid_frac": step / 10} for step in (1, 2, 3)]
        (run / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in shares))
        line = {"step": 3, "epoch": 0, "top1": config.region.threshold, "k": 10}
        (run / KNN_FILE).write_text(json.dumps(line) + "\n")


def evaluate(arguments: list[str]) -> None:
    task = arguments[0]
    given = dict(zip(arguments[1::2], arguments[2::2], strict=False))
    found = {"regions": "found", "threshold": 0.75, "blocks": 2, "seed_policy": "uniform"}
    scores: dict[str, list[tuple[str, float, dict[str, object]]]] = {
        "seg-knn": [("mIoU", 50.0, {})],
        "seg-linear": [("mIoU", 60.0, {})],
        "region-quality": [("purity", 70.0, found), ("purity", 40.0, {**found, "regions": "blob"})],
    }
    dataset = "voc2012" if task.startswith("seg") else "shapes"
    model = {"name": "m", "source": given["--weights"], "fingerprint": "f", "dim": 1, "depth": 1, "patch_px": 16}
    result = {
        "task": task, "dataset": dataset, "model": model, "settings": {}, "chosen": {},
        "scores": [{"metric": m, "value": v, "std": None, "settings": s} for m, v, s in scores[task]],
    }  # fmt: skip
    out = Path(given["--out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{task}-{dataset}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    with open(os.environ["STAND_IN_CALLS"], "a") as calls:
        calls.write(" ".join(sys.argv[1:]) + "\n")
    {"train": train, "eval": evaluate}[sys.argv[1]](sys.argv[2:])
