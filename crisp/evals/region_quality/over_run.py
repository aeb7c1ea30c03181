"""Region quality over training: every checkpoint of a run, as RUN/region_quality.json.

The file is a list in order of data set and step:

    {"dataset": "camvid", "step": 1000, "epoch": 8.3, "threshold": 0.75, "blocks": 4, "seed_policy": "uniform",
     "warp_mode": "centre", "images": 40, "seeds_per_image": 8, "seed": 0, "boundary_px": 8,
     "found": {"purity": 61.2, …, "valid": 40.1}, "blob": {…}, "scattered": {…}}

Percentages of `crisp.evals.region_quality.measures`; a measure that is not defined is absent.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from crisp.checkpoint import list_checkpoints, step_of
from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.region_quality.config import RegionQualityConfig
from crisp.evals.region_quality.evaluate import evaluate_region_quality
from crisp.evals.region_quality.measures import MEASURES
from crisp.evals.region_quality.scores import KINDS, VALID
from crisp.evals.results import DIGITS, Result, Score, write_whole
from crisp.evals.running import from_main
from crisp.models.published import load_frozen
from crisp.run_state import read_state
from crisp.runs import CHECKPOINTS, CONFIG_FILE, QUALITY_FILE, read_run_config

log = logging.getLogger(__name__)


def score_checkpoints(config: RegionQualityConfig, world: World) -> Path:
    """Score every checkpoint that a run has kept, with one setting: its own, or the first of the grid. Collective.

    What the file holds of other steps (of checkpoints that are gone) and of other data sets stays.

    Args:
        config: `weights` is the run's folder.
        world: this rank's.

    Returns:
        RUN/region_quality.json.

    Raises:
        CrispError: not a run, no checkpoint, or what `evaluate_region_quality` raises.
    """
    run = Path(config.weights)
    if not (run / CONFIG_FILE).is_file():
        raise CrispError(f"{run}: not the folder of a run, so it has no checkpoints; leave out --all-checkpoints")
    checkpoints = from_main(world, lambda: list_checkpoints(run / CHECKPOINTS))
    if not checkpoints:
        raise CrispError(f"{run}: no checkpoint yet; go on with 'crisp train --resume {run}' until there is one")
    path = run / QUALITY_FILE
    for checkpoint in checkpoints:
        one = replace(config, weights=str(checkpoint))
        result = evaluate_region_quality(one, load_frozen(one.weights, device=world.device), world)
        if world.is_main:
            line = quality_at(result, step=step_of(checkpoint), epoch=_epoch(run, step_of(checkpoint)))
            log.info("step %d: %s", line["step"], _told(line))
            write_whole(path, json.dumps(merged(read_quality(path), line), indent=2) + "\n")
    return path


def read_quality(path: Path) -> list[dict[str, Any]]:
    """What the file holds; [] where there is none.

    Raises:
        CrispError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        lines = json.loads(path.read_text())
        if not isinstance(lines, list) or not all({"dataset", "step"} <= set(line) for line in lines):
            raise TypeError("not a list of steps")
    except (OSError, ValueError, TypeError) as error:
        raise CrispError(f"{path}: cannot be read ({error}); remove it, and score the checkpoints again") from error
    return lines


def merged(lines: Sequence[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """With a line in place of that of its data set and step."""
    kept = [line for line in lines if (line["dataset"], line["step"]) != (new["dataset"], new["step"])]
    return sorted([*kept, new], key=lambda line: (line["dataset"], line["step"]))


def quality_at(result: Result, *, step: int, epoch: float | None) -> dict[str, Any]:
    """A line of the file: the first setting of a result."""
    first = next(score.settings for score in result.scores if score.metric == VALID)
    own = {name: value for name, value in first.items() if name != "regions"}
    line: dict[str, Any] = {"dataset": result.dataset, "step": step, "epoch": epoch, **own}
    line |= {name: result.settings[name] for name in ("images", "seeds_per_image", "seed", "boundary_px")}
    for kind in KINDS:
        wanted = {"regions": kind, **own}
        line[kind] = {
            s.metric: round(s.value, DIGITS)
            for s in result.scores
            if s.metric in (*MEASURES, VALID) and _is_of(s, wanted)
        }
    return line


def _is_of(score: Score, wanted: dict[str, Any]) -> bool:
    """Whether a score is of these regions; only `valid` has a warp mode."""
    return all(score.settings[name] == value for name, value in wanted.items() if name in score.settings)


def _epoch(run: Path, step: int) -> float | None:
    state = read_state(run)
    return None if state is None else step * read_run_config(run).optim.epochs / state.steps


def _told(line: dict[str, Any]) -> str:
    found, blob = line["found"], line["blob"]
    if "purity" not in found:
        return f"no region of a segment, {found[VALID]:.1f} % valid"
    return f"purity {found['purity']:.1f} % (random {blob['purity']:.1f} %), {found[VALID]:.1f} % valid"
