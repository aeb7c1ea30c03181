"""The `crisp` command. Nothing heavy is imported until a command has been chosen."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crisp import __version__
from crisp.errors import CrispError
from crisp.process_settings import SETTINGS, start_again_with_allocator


def _shard(args: Sequence[str]) -> None:
    import tyro

    if args and args[0] == "verify":
        from crisp.shard_imagenet.verify import VerifyConfig, main as verify  # isort: skip

        verify(tyro.cli(VerifyConfig, args=args[1:], prog="crisp shard verify"))
    elif args and args[0] == "merge":
        from crisp.shard_imagenet.command import MergeConfig, merge

        merge(tyro.cli(MergeConfig, args=args[1:], prog="crisp shard merge"))
    else:
        from crisp.shard_imagenet.config import ShardConfig

        config = tyro.cli(ShardConfig, args=args, prog="crisp shard", description=_SHARD_HELP)
        from crisp.shard_imagenet.command import main as shard

        shard(config)


_SHARD_HELP = """Turn images into WebDataset shards with an index. Started again after a stop, it goes on where it was.

Beside this: 'crisp shard verify OUT' checks every byte, 'crisp shard merge OUT' completes what partitions have made."""


def _train(args: Sequence[str]) -> None:
    from crisp.recipes import MAIN

    if not args or args[0] in ("-h", "--help"):
        rows = {name: (recipe.__doc__ or "").splitlines()[0] for name, recipe in MAIN.items()}
        print(
            "usage: crisp train RECIPE [--field value …]\n"
            "       crisp train --resume RUN [--field value …]\n\n"
            f"{_table(rows)}\n\n'crisp recipes' has the rows of ablations, too; "
            "'crisp train RECIPE --help' lists the fields and this recipe's values."
        )
        return
    import tyro

    from crisp.config import TrainConfig
    from crisp.recipes import recipe_named
    from crisp.runs import check_resumable, read_run_config

    def parse(default: TrainConfig, rest: Sequence[str], prog: str) -> TrainConfig:
        return tyro.cli(TrainConfig, default=default, args=rest, prog=prog)

    resume = args[0] == "--resume"
    if resume:
        if len(args) < 2:
            raise CrispError("--resume: no run given; name its folder, as in 'crisp train --resume runs/vits16'")
        written = read_run_config(Path(args[1]))
        config = parse(written, args[2:], f"crisp train --resume {args[1]}")
        check_resumable(written, config)
    else:
        config = parse(recipe_named(args[0]), args[1:], f"crisp train {args[0]}")
    from crisp.trainer import train

    train(config, resume=resume)


def _recipes(args: Sequence[str]) -> None:
    import inspect

    from crisp.recipes import RECIPES

    if args and args[0] in ("-h", "--help"):
        print("usage: crisp recipes [NAME…]\n\nLists the recipes of 'crisp train'; with names, tells all about these.")
        return
    if unknown := [name for name in args if name not in RECIPES]:
        raise CrispError(f"recipe {unknown[0]!r}: there is no such recipe; 'crisp recipes' lists them")
    if args:
        print("\n\n".join(f"{name}\n{inspect.getdoc(RECIPES[name])}" for name in args))
    else:
        print(_table({name: (inspect.getdoc(recipe) or "").splitlines()[0] for name, recipe in RECIPES.items()}))


def _runs(args: Sequence[str]) -> None:
    import tyro

    from crisp.run_list import RunsConfig, main as runs  # isort: skip

    runs(tyro.cli(RunsConfig, args=args, prog="crisp runs", description=COMMANDS["runs"].help))


def _bench(args: Sequence[str]) -> None:
    _run_module("bench", "benchmark", BENCHMARKS, "crisp.benchmarks", args)


def _viz(args: Sequence[str]) -> None:
    _run_module("viz", "picture", PICTURES, "crisp.viz", args)


def _eval(args: Sequence[str]) -> None:
    helps = {name: evaluation.help for name, evaluation in EVALUATIONS.items()}
    modules = {name: evaluation.module for name, evaluation in EVALUATIONS.items()}
    _run_module("eval", "evaluation", helps, modules, args)


def _run_module(
    command: str, kind: str, table: dict[str, str], package: str | dict[str, str], args: Sequence[str]
) -> None:
    """Hand what follows the name to `main` of its module, or list the names.

    Args:
        command: what was typed before the name.
        kind: what the names name.
        table: a line of help by name.
        package: where there is a module for each name, or each name's module.
        args: the name and what follows it.
    """
    import importlib

    if not args or args[0] in ("-h", "--help"):
        print(f"usage: crisp {command} NAME [--field value …]\n\n" + _table(table))
        return
    if args[0] not in table:
        raise CrispError(f"{command} {args[0]!r}: there is no such {kind}; choose one of {', '.join(table)}")
    path = f"{package}.{args[0]}" if isinstance(package, str) else package[args[0]]
    importlib.import_module(path).main(args[1:])


def _ablate(args: Sequence[str]) -> None:
    from crisp.ablate.command import main as ablate

    ablate(args)


def _export(args: Sequence[str]) -> None:
    import tyro

    from crisp.export.config import ExportConfig

    config = tyro.cli(ExportConfig, args=args, prog="crisp export")
    from crisp.export.command import export

    export(config)


def _report(args: Sequence[str]) -> None:
    import tyro

    from crisp.report.config import ReportConfig

    config = tyro.cli(ReportConfig, args=args, prog="crisp report", description=COMMANDS["report"].help)
    from crisp.report.command import main as report

    report(config)


def _demo(args: Sequence[str]) -> None:
    import tyro

    from crisp.demo import DemoConfig

    config = tyro.cli(DemoConfig, args=args, prog="crisp demo", description=COMMANDS["demo"].help)
    from crisp.demo import main as demo

    demo(config)


def _doctor(args: Sequence[str]) -> None:
    import tyro

    from crisp.doctor.config import DoctorConfig

    config = tyro.cli(DoctorConfig, args=args, prog="crisp doctor", description=COMMANDS["doctor"].help)
    from crisp.doctor.command import main as doctor

    doctor(config)


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command's line in the help, and what it runs."""

    help: str
    run: Callable[[Sequence[str]], None]
    takes_steps: bool = False
    """It takes training steps, in this process or in those that it starts as they are"""


COMMANDS = {
    "shard": Command(help="turn images into WebDataset shards with an index; verify and merge them", run=_shard),
    "bench": Command(help="measure the loader and its parts on this machine", run=_bench),
    "train": Command(help="pre-train a recipe, or resume a run", run=_train, takes_steps=True),
    "recipes": Command(help="list the recipes of `crisp train`, or tell about some", run=_recipes),
    "runs": Command(help="list the runs of a folder: how far each is, whether it goes on, its last scores", run=_runs),
    "eval": Command(
        help="score a frozen model, ours or another, on the paper's benchmarks beside its figures", run=_eval
    ),
    "ablate": Command(help="train and evaluate the rows of an ablation beside the paper's table", run=_ablate),
    "viz": Command(help="draw samples, regions, features, matches, attention, curves", run=_viz),
    "report": Command(help="write a run, or several side by side, as one HTML page", run=_report),
    "export": Command(help="write a trained backbone for timm, transformers or ONNX", run=_export),
    "demo": Command(help="the whole chain on a few hundred small photographs, in minutes", run=_demo, takes_steps=True),
    "doctor": Command(
        help="what this machine has, and whether every fast path is right on it; a report",
        run=_doctor,
        takes_steps=True,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """An evaluation's line in the help, and the module whose `main` it is."""

    help: str
    module: str


EVALUATIONS = {
    "knn": Evaluation(
        help="ImageNet k-NN with 1 %, 10 % and 100 % of the labels (Table 4)",
        module="crisp.evals.classification.command_knn",
    ),
    "linear": Evaluation(
        help="ImageNet linear classifiers, all learning rates in one pass (Table 4)",
        module="crisp.evals.classification.command_linear",
    ),
    "seg-knn": Evaluation(
        help="semantic segmentation by k-NN of patches: ADE20K, VOC 2012, Cityscapes (Table 1)",
        module="crisp.evals.segmentation.command_knn",
    ),
    "seg-linear": Evaluation(
        help="semantic segmentation by logistic regression of patches (Table 1)",
        module="crisp.evals.segmentation.command_linear",
    ),
    "video": Evaluation(
        help="masks propagated through videos: DAVIS, YouTube-VOS, MOSE (Table 2)", module="crisp.evals.video.command"
    ),
    "multilabel": Evaluation(
        help="multi-label classification: VOC 2012, COCO, Visual Genome, low-shot too (Table 3)",
        module="crisp.evals.multilabel.command",
    ),
    "region-quality": Evaluation(
        help="discovered regions against true segments and against random regions, over β, M, seeds, warping",
        module="crisp.evals.region_quality.command",
    ),
    "all": Evaluation(
        help="all of these that the data on disk allows, in one table beside the paper's", module="crisp.evals.all"
    ),
}

BENCHMARKS = {
    "feed": "GPUs of a given img/s that this node can feed, from originals and from 320 and 256 px shards",
    "knn": "k-NN over a bank of labelled patches against the plain form, and its memory at full size",
    "loader": "samples per second of each renderer against a torchvision/PIL loader",
    "plan": "milliseconds to draw a batch: order, crops, colours, block masks",
    "shard": "images per second of `crisp shard` against decoding alone and other writers",
    "step": "a training step's time and memory, with and without regions, and the loader's headroom over it",
    "warp": "region discovery and warping: torch form, and Triton where there is a GPU",
}

PICTURES = {
    "regions": "reference with seed and region, and both views with theirs, of models or checkpoints",
    "pca": "principal components of patch features as colours, several models in columns",
    "correspondence": "the patches of another image, or of another view, that match best",
    "attention": "attention of the [CLS] token, per head",
    "curves": "losses and scores of runs against epochs; tables of ablations",
    "views": "one sample as the loader makes it: reference, all views, and a grid drawn through the affine on each",
}


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())


def _help() -> str:
    return (
        f"crisp {__version__}: self-supervised pre-training of Vision Transformers with region-level consistency\n\n"
        "usage: crisp COMMAND …\n\n"
        + _table({name: command.help for name, command in COMMANDS.items()})
        + "\n\n'crisp COMMAND --help' lists a command's fields. Start with 'crisp demo'."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 after a user's mistake, 2 for a wrong command line."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    if args[0] == "--version":
        print(f"crisp {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"crisp: {args[0]!r} is not a command; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # Before torch is imported: that is when they are read.
    if argv is None and COMMANDS[args[0]].takes_steps:
        start_again_with_allocator()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        COMMANDS[args[0]].run(args[1:])
    except CrispError as error:
        print(f"crisp {args[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"crisp {args[0]}: interrupted", file=sys.stderr)
        return 130
    return 0
