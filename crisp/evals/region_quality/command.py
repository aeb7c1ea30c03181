"""`crisp eval region-quality`: how good the regions are that a model discovers."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import tyro
from rich.console import Console
from rich.text import Text

from crisp.evals.region_quality.config import RegionQualityConfig
from crisp.evals.region_quality.evaluate import evaluate_region_quality
from crisp.evals.region_quality.measures import MEASURES
from crisp.evals.region_quality.over_run import score_checkpoints
from crisp.evals.region_quality.scores import KINDS, VALID
from crisp.evals.results import Result, result_json, write_whole
from crisp.evals.running import evaluation_world
from crisp.evals.tables import MISSING, describe, markdown_table
from crisp.models.published import load_frozen

log = logging.getLogger(__name__)

NAMES = {
    "found": "discovered",
    "blob": "random, connected",
    "scattered": "random patches",
}


def main(args: Sequence[str]) -> None:
    """Parse, evaluate, print, and write OUT/region-quality-DATASET.json and .md, or RUN/region_quality.json."""
    config = tyro.cli(RegionQualityConfig, args=args, prog="crisp eval region-quality")
    with evaluation_world(config) as world:
        if config.all_checkpoints:
            path = score_checkpoints(config, world)
            if world.is_main:
                log.info("%s", path)
            return
        model = load_frozen(config.weights, device=world.device)
        result = evaluate_region_quality(config, model, world)
        if world.is_main:
            text = quality_markdown(result)
            Console(highlight=False, soft_wrap=True).print(
                Text(quality_table(result) + "\n" + "\n".join(quality_gains(result)))
            )
            path = config.out / f"{result.stem}.json"
            write_whole(path.with_suffix(".md"), text)
            write_whole(path, result_json(result))
            log.info("%s", path)


def quality_lines(result: Result) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the table: one line for each setting and kind of regions, the kinds of a setting together."""
    modes = list(dict.fromkeys(s.settings["warp_mode"] for s in result.scores if s.metric == VALID))
    values: dict[tuple[Any, ...], dict[str, float]] = {}
    for score in result.scores:
        if score.metric not in (*MEASURES, VALID):
            continue
        key = tuple(score.settings[name] for name in ("threshold", "blocks", "seed_policy", "regions"))
        column = f"{VALID}, {score.settings['warp_mode']}" if score.metric == VALID else score.metric
        values.setdefault(key, {})[column] = score.value
    columns = [*MEASURES, *(f"{VALID}, {mode}" for mode in modes)]
    order = {key[:3]: number for number, key in reversed(list(enumerate(values)))}
    lines = [
        [NAMES[key[3]], f"β {key[0]:g}, M {key[1]}, {key[2]}", *(_figure(values[key], column) for column in columns)]
        for key in sorted(values, key=lambda key: (order[key[:3]], KINDS.index(key[3])))
    ]
    return ["regions", "setting", *columns], lines


def _figure(values: Mapping[str, float], column: str) -> str:
    return f"{values[column]:.1f}" if column in values else MISSING


def quality_gains(result: Result) -> list[str]:
    """What discovered regions gain over connected random ones, a line for each setting."""
    lines = []
    for score in result.scores:
        if score.metric.endswith("-gain"):
            told = score.settings
            error = "" if score.std is None else f" ± {score.std:.1f}, the standard error over images"
            setting = f"β {told['threshold']:g}, M {told['blocks']}, {told['seed_policy']}"
            name = score.metric.removesuffix("-gain")
            lines.append(f"{setting}: {name} {score.value:+.1f}{error}, against connected random regions.")
    return lines


def quality_table(result: Result) -> str:
    """The table as Markdown."""
    return markdown_table(*quality_lines(result))


def quality_markdown(result: Result) -> str:
    """A page: the table, what its columns mean, all settings."""
    settings = result.settings
    facts = result.model
    return "\n".join(
        [
            f"# {result.task} on {result.dataset}: {facts.name}\n",
            quality_table(result),
            *(f"{gain}\n" for gain in quality_gains(result)),
            f"Percent, means over {settings['regions']} regions ({settings['seeds_per_image']} of each of "
            f"{settings['images']} images); {settings['regions_of_a_segment']} have a seed whose label is not ignored. "
            f"Boundaries count as met within {settings['boundary_px']} px. Random regions have the seeds and the sizes "
            f"of the discovered ones. `crisp/evals/region_quality/measures.py` defines each measure.\n",
            f"Weights: `{facts.source}`, fingerprint `{facts.fingerprint[:16]}`.\n",
            describe(settings) + "\n",
        ]
    )
