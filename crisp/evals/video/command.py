"""`crisp eval video`: masks propagated through every sequence, their scores, and archives for the servers."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from crisp.distributed import World
from crisp.errors import CrispError
from crisp.evals.bar import bar
from crisp.evals.results import ModelFacts, Result, Score, print_result, write_result, write_whole
from crisp.evals.running import autocast, evaluation_world, together
from crisp.evals.video import protocol
from crisp.evals.video.archive import write_archive
from crisp.evals.video.checks import SequenceFacts, check_data
from crisp.evals.video.config import VideoConfig
from crisp.evals.video.frames import Size, import_cv2, prepared_size
from crisp.evals.video.layouts import LAYOUTS
from crisp.evals.video.scoring import ObjectScore, averages, score_sequence, table
from crisp.evals.video.segmenting import Extractor, segment_to_disk
from crisp.evals.video.sequences import VideoData, VideoSequence
from crisp.models.frozen import FrozenModel

log = logging.getLogger(__name__)

TASK = "video"

# The split of each data set whose scores stand beside the paper's, under the data set's own name.
_COMPARED = {"davis2017": "val", "davis2016": "val", "youtube-vos": "holdout", "mose": "holdout", "folder": "all"}


def main(args: Sequence[str]) -> None:
    """Run the command."""
    import tyro

    config = tyro.cli(VideoConfig, args=args, prog="crisp eval video")
    from crisp.models.published import load_frozen

    with evaluation_world(config) as world:
        import_cv2()
        data = list_data(config)
        model = load_frozen(config.weights, device=world.device)
        result = evaluate_video(config, model, world, data=data)
        if world.is_main:
            log.info("%s", write_result(config.out, result))
            print_result(result)


def list_data(config: VideoConfig) -> VideoData:
    """The sequences of the chosen split.

    Raises:
        CrispError: the folder is not the data set, or files are missing.
    """
    if not config.data.is_dir():
        raise CrispError(f"{config.data}: no such folder; unpack {config.dataset} there, or give another with --data")
    return LAYOUTS[config.dataset].read(config.data, config.split_or_default)


def evaluate_video(config: VideoConfig, model: FrozenModel, world: World, *, data: VideoData | None = None) -> Result:
    """Propagate, then score or pack. Collective: each rank takes some sequences, all return the same.

    Args:
        config: of the evaluation.
        model: on `world.device`.
        world: of the ranks, which share the folder `config.out`.
        data: what `list_data` returned, if it was called already.

    Returns:
        J&F, J and F in percent (the first size's first) where the truth is known; else a result without scores, which
        names the archives.

    Raises:
        CrispError: of the data, before anything is computed; layers that the model lacks; a disk that cannot be
            written; in several ranks, the first one's.
    """
    data = data or list_data(config)
    if config.layers > model.backbone.depth:
        raise CrispError(f"layers={config.layers}: {model.name} has {model.backbone.depth} blocks; give fewer")
    facts = check_data(data, threads=config.threads)
    scores: list[Score] = []
    outputs: dict[str, str] = {}
    sizes: dict[str, Mapping[str, Any]] = {}
    for size in config.sizes:
        settings = settings_of(config, model, data, size)
        folder = masks_folder(config, data, size, settings)
        extractor = Extractor(
            backbone=model.backbone, device=world.device, size=size, layers=config.layers,
            mean=settings["mean"], std=settings["std"], batch=config.batch, threads=config.threads,
            autocast=partial(autocast, config, world.device),
        )  # fmt: skip
        _log_sizes(facts, size, model.backbone.patch_px)
        if world.is_main:
            write_whole(folder / "settings.json", json.dumps(settings, sort_keys=True, indent=2) + "\n")
        shares = together(partial(_work, data, facts, extractor, folder, world, config.threads))
        objects = sorted((s for share in shares for s in share), key=lambda s: (s.sequence, s.object_id))
        sizes[size] = settings
        if objects:
            scores += [
                Score(metric=measure, value=value, settings={"size": size, "statistic": statistic})
                for (measure, statistic), value in averages(objects).items()
            ]
            if world.is_main:
                write_whole(folder / "objects.csv", table(objects))
        if data.archive_root is not None:
            outputs[size] = f"{folder.name}.zip"
            if world.is_main:
                path = config.out / outputs[size]
                write_archive(path, data.sequences, folder / "masks", root=data.archive_root)
                log.info("%s: for the server of %s", path, data.dataset)
    if data.scored and data.split == "holdout":
        log.info(
            "%s: %d held-out videos of train: the truth of its validation split, which the paper reports, is hidden",
            data.dataset, len(data.sequences),
        )  # fmt: skip
    return Result(
        task=TASK,
        dataset=data.dataset if data.split == _COMPARED[data.dataset] else f"{data.dataset}-{data.split}",
        model=ModelFacts.of(model),
        scores=scores,
        settings={
            "sizes": sizes,
            "sequences": len(data.sequences),
            "objects": sum(len(f.objects) for f in facts.values()),
            "data": _digest([facts[sequence.name].digest for sequence in data.sequences]),
            "archives": outputs,
        },
    )


def settings_of(config: VideoConfig, model: FrozenModel, data: VideoData, size: Size) -> dict[str, Any]:
    """All that masks and scores depend on beside the data's files."""
    dino = config.normalisation == "dino"
    return {
        "dataset": data.dataset,
        "split": data.split,
        "weights": model.fingerprint,
        "size": size,
        "layers": config.layers,
        "mean": tuple(protocol.DINO_MEAN if dino else model.backbone.mean),
        "std": tuple(protocol.DINO_STD if dino else model.backbone.std),
        "precision": config.precision,
        "protocol": {name.lower(): getattr(protocol, name) for name in dir(protocol) if name.isupper()},
    }


def masks_folder(config: VideoConfig, data: VideoData, size: Size, settings: Mapping[str, Any]) -> Path:
    """OUT/video-DATASET-SPLIT-SIZE-DIGEST: other weights or settings have other folders, so that none is mixed up."""
    return config.out / f"{TASK}-{data.dataset}-{data.split}-{size}-{_digest(settings)[:12]}"


def share_of_rank(sequences: Sequence[VideoSequence], rank: int, ranks: int) -> list[VideoSequence]:
    """A rank's sequences: from the longest on, each goes to the rank with the fewest frames so far."""
    load = [0] * ranks
    shares: list[list[VideoSequence]] = [[] for _ in range(ranks)]
    for sequence in sorted(sequences, key=lambda s: (-len(s.frames), s.name)):
        least = load.index(min(load))
        shares[least].append(sequence)
        load[least] += len(sequence.frames)
    return shares[rank]


def _work(
    data: VideoData,
    facts: Mapping[str, SequenceFacts],
    extractor: Extractor,
    folder: Path,
    world: World,
    threads: int,
) -> list[ObjectScore]:
    """Masks and, where the truth is known, scores of this rank's sequences."""
    share = share_of_rank(data.sequences, world.rank, world.size)
    scores: list[ObjectScore] = []
    there = 0
    title = f"{data.dataset} {data.split} at {extractor.size}"
    with bar(title, sum(len(s.frames) for s in share), silent=not world.is_main) as advance:
        for sequence in share:
            computed = segment_to_disk(
                sequence, facts[sequence.name], extractor, folder, single_object=data.single_object
            )
            there += not computed
            if sequence.truths:
                masks = folder / "masks" / sequence.name
                scores += score_sequence(
                    sequence, facts[sequence.name], masks, single_object=data.single_object, threads=threads
                )
            advance(len(sequence.frames))
    log.info("%s: masks of %d sequences written, of %d there already", folder, len(share) - there, there)
    return scores


def _log_sizes(facts: Mapping[str, SequenceFacts], size: Size, patch_px: int) -> None:
    pairs = {
        ((f.height_px, f.width_px), prepared_size(f.height_px, f.width_px, size=size, patch_px=patch_px))
        for f in facts.values()
    }
    shown = [f"{w0}×{h0} as {w}×{h}" for (h0, w0), (h, w) in sorted(pairs)]
    more = f" and {len(shown) - 4} more sizes" if len(shown) > 4 else ""
    log.info("frames of %s%s px (patches of %d)", ", ".join(shown[:4]), more, patch_px)
    if protocol.SHORT_SIDE_PX % patch_px:
        log.warning(
            "patches of %d px do not divide %d px: sides are floored to whole patches", patch_px, protocol.SHORT_SIDE_PX
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
