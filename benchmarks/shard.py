"""Images per second of `crisp shard` against decoding alone and other writers; and a manifest of 142 million samples.

    crisp bench shard --images DIR [--peers-python PATH] [--json FILE]        (or: python -m crisp.benchmarks.shard …)

The images are copied once, linked as often as `copies` says into class folders, and so come out of the page cache. Then
the contenders take turns, each in fresh processes, with a sync of the disks in between:

- crisp: `shard_imagenet` with W processes, 8 shards for each. It syncs every shard to disk; nobody else does.
- decoders: W processes read the files and decode them to RGB, and do nothing else. The fastest is the limit.
- strict check: likewise, with the decoding by which crisp sees that an image is whole.
- PIL+webdataset, litdata, MDS: the scripts in `peers/`, which store the same, made with PIL. The last two need an
  interpreter with peers/requirements.txt.

The clock of crisp and of the scripts starts when interpreter and imports are ready and stops when all is written. The
start of worker processes lies within: crisp's are new interpreters, the scripts' are forked at hardly any cost. The
decoders' clock starts when their processes are ready. Before the first round crisp re-encodes once, which fills numba's
cache. `results/shard.md` has figures.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from crisp.benchmarks.machine import processor
from crisp.benchmarks.peers.clock import cpu_seconds
from crisp.benchmarks.peers.shard_decoders import DECODERS, STRICT_CHECK, decode_all
from crisp.benchmarks.report_file import check_report, write_report
from crisp.benchmarks.shard_manifest import ManifestResult, summarise_manifest, take_manifest_turn, write_manifest
from crisp.errors import CrispError
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.shard import Sharded, shard_imagenet

SHORT_SIDE, QUALITY = 256, 90

# Script, and whether crisp's own dependencies are enough for it.
PEERS = {
    "PIL+webdataset": ("shard_webdataset.py", True),
    "litdata": ("shard_litdata.py", False),
    "MDS": ("shard_mosaic.py", False),
}

_T = TypeVar("_T")
_SHARDS_PER_WORKER = 8  # so that nobody waits long for the last shard; data sets worth sharding have thousands
_UNTOUCHED, _REENCODE = "untouched", "re-encode"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardBenchConfig:
    """Measure sharding on a folder of JPEGs."""

    images: Path
    """Folder of JPEGs, at any depth; photographs at their original size."""
    rounds: int = 3
    """Turns of each contender; medians are reported."""
    workers: int = 0
    """Processes of every contender; 0: the cores of this machine."""
    copies: int = 40
    """How often each image is linked, so that the start of processes does not count."""
    peers_python: Path | None = None
    """Interpreter of the peers' scripts (peers/requirements.txt); default: this one, without litdata and MDS."""
    json: Path | None = None
    """Also write configuration, machine and results here."""

    def __post_init__(self) -> None:
        for name in ("rounds", "copies"):
            value = getattr(self, name)
            if value < 1:
                raise CrispError(f"{name}={value}: must be 1 or more")
        if self.workers < 0:
            raise CrispError(f"workers={self.workers}: must be 0 (all cores) or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One turn of one contender."""

    images_per_s: float
    cpu_ms_per_image: float
    """Of all its processes; unlike the rate, it hardly suffers from what else the machine does"""
    bytes_per_image: float | None = None
    """Of all that was written"""
    peak_rss_mb: float | None = None
    """Of crisp's largest worker"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One contender: the median over its turns, and the slowest and the fastest turn."""

    section: str
    """'untouched' or 're-encode'"""
    name: str
    images_per_s: float
    slowest: float
    fastest: float
    rounds: list[float]
    """Images per second of each round"""
    cpu_ms_per_image: float
    kb_per_image: float | None
    peak_rss_mb: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A figure and what it should be."""

    name: str
    value: float
    per_round: float | None
    """Median of the rounds' ratios, where `value` is a ratio of medians"""
    by_cpu: float | None
    """The same ratio by processor time"""
    goal: str
    met: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Everything of a run."""

    images: int
    workers: int
    results: list[Result]
    manifest: ManifestResult
    claims: list[Claim]
    skipped: dict[str, str]
    """Reason by contender"""


def bench_shard(config: ShardBenchConfig) -> Measured:
    """Interleaved turns of every contender, and as many of the large manifest.

    Raises:
        CrispError: no JPEG, a damaged one, a peer that fails.
    """
    workers = config.workers or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="crisp-bench-") as name:
        scratch = Path(name)
        files = prepare_images(config, scratch / "images")
        contenders, skipped = _contenders(config, scratch, files, workers)
        # Once per installation numba compiles the resize: not a matter of this or that run.
        contenders[_REENCODE, "crisp"]()
        turns: dict[tuple[str, str], list[Turn]] = {key: [] for key in contenders}
        for _ in range(config.rounds):
            for key, take_turn in contenders.items():
                os.sync()  # what the one before has written is not this one's to wait for
                turns[key].append(take_turn())
        shutil.rmtree(scratch / "images")
        results = [_summary(*key, done) for key, done in turns.items()]
        manifest = _bench_manifest(scratch / "manifest", config.rounds)
    claims = make_claims(results, manifest)
    return Measured(
        images=len(files), workers=workers, results=results, manifest=manifest, claims=claims, skipped=skipped
    )


def prepare_images(config: ShardBenchConfig, folder: Path) -> list[str]:
    """Copy the JPEGs into a class folder and link them into others; the paths of all.

    Raises:
        CrispError: there is none.
    """
    found = sorted(path for path in config.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise CrispError(f"{config.images}: no .jpg or .jpeg in it; name a folder of JPEGs")
    files: list[str] = []
    for copy in range(config.copies):
        (folder / f"class-{copy:04d}").mkdir(parents=True)
        for number, path in enumerate(found):
            file = folder / f"class-{copy:04d}" / f"{number:07d}.jpg"
            if copy == 0:
                shutil.copyfile(path, file)
            else:
                os.link(files[number], file)
            files.append(str(file))
    return files


def _contenders(
    config: ShardBenchConfig, scratch: Path, files: list[str], workers: int
) -> tuple[dict[tuple[str, str], Callable[[], Turn]], dict[str, str]]:
    """Functions that take a turn, by section and name; and who is left out, with the reason."""
    skipped = {}
    ours = {
        "source": str(scratch / "images"),
        "out": str(scratch / "out"),
        "workers": workers,
        "shard_samples": -(-len(files) // (workers * _SHARDS_PER_WORKER)),
    }
    reencode = {"short_side": SHORT_SIDE, "quality": QUALITY}
    turns: dict[tuple[str, str], Callable[[], Turn]] = {("untouched", "crisp"): lambda: _crisp_turn(ours)}
    for name, (module, _) in DECODERS.items():
        if importlib.util.find_spec(module) is None:
            skipped[name] = f"{module} is not installed"
        else:
            turns["untouched", name] = functools.partial(_decode_turn, name, files, workers)
    turns["re-encode", "crisp"] = lambda: _crisp_turn(ours | reencode)
    for name, (script, everywhere) in PEERS.items():
        if config.peers_python is None and not everywhere:
            skipped[name] = "no --peers-python (peers/requirements.txt)"
        else:
            python = config.peers_python or Path(sys.executable)
            turns["re-encode", name] = functools.partial(_peer_turn, python, script, scratch, workers)
    return turns, skipped


def _bench_manifest(folder: Path, rounds: int) -> ManifestResult:
    write_manifest(folder)
    cold, warm = [], []
    for _ in range(rounds):
        cold.append(in_fresh_process(take_manifest_turn, folder, True))
        warm.append(in_fresh_process(take_manifest_turn, folder, False))
    return summarise_manifest(folder, cold, warm)


def in_fresh_process(function: Callable[..., _T], *args: object) -> _T:
    """Call a function in a new interpreter: nothing that ran before is in its memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# --- crisp and its peers --------------------------------------------------------------------------------------------


def _crisp_turn(values: dict[str, Any]) -> Turn:
    sharded, seconds, cpu_s = in_fresh_process(run_crisp, values)
    assert sharded.manifest is not None, "there are no partitions"
    images, rejected = sharded.manifest.samples, sharded.manifest.rejected
    if rejected:
        raise CrispError(f"images: {rejected} were rejected by crisp, so no comparison is fair; leave them out")
    return Turn(
        images_per_s=images / seconds,
        cpu_ms_per_image=cpu_s / images * 1e3,
        bytes_per_image=_take_away(Path(values["out"])) / images,
        peak_rss_mb=sharded.peak_rss_bytes / 1e6,
    )


def run_crisp(values: dict[str, Any]) -> tuple[Sharded, float, float]:
    """What was sharded, and seconds by the clock and of processors, this process's and its workers'."""
    cfg = ShardConfig(**values)
    start_s, cpu_start_s = time.perf_counter(), cpu_seconds()
    (sharded,) = shard_imagenet(cfg)
    return sharded, time.perf_counter() - start_s, cpu_seconds() - cpu_start_s


def _peer_turn(python: Path, script: str, scratch: Path, workers: int) -> Turn:
    out = scratch / "out"
    command = [python, Path(__file__).parent / "peers" / script, scratch / "images", out]
    options = {"--workers": workers, "--short-side": SHORT_SIDE, "--quality": QUALITY}
    # litdata writes its chunks elsewhere before they come to their place: on the same disk.
    environment = os.environ | {"DATA_OPTIMIZER_CACHE_FOLDER": str(scratch / "cache"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*map(str, command), *(str(word) for option in options.items() for word in option)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CrispError(f"peers_python={python}: {script} failed ({last}); it needs peers/requirements.txt")
    said = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(scratch / "cache", ignore_errors=True)
    images = said["images"]
    return Turn(
        images_per_s=images / said["seconds"],
        cpu_ms_per_image=said["cpu_seconds"] / images * 1e3,
        bytes_per_image=_take_away(out) / images,
    )


def _take_away(folder: Path) -> int:
    """Remove a folder; the bytes of its files."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return size


def _decode_turn(decoder: str, files: list[str], workers: int) -> Turn:
    seconds, cpu_s = decode_all(decoder, files, workers)
    return Turn(images_per_s=len(files) / seconds, cpu_ms_per_image=cpu_s / len(files) * 1e3)


# --- what it says ---------------------------------------------------------------------------------------------------


def _summary(section: str, name: str, turns: Sequence[Turn]) -> Result:
    rates = [turn.images_per_s for turn in turns]
    written, memory = turns[-1].bytes_per_image, [turn.peak_rss_mb for turn in turns if turn.peak_rss_mb is not None]
    return Result(
        section=section,
        name=name,
        images_per_s=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
        rounds=rates,
        cpu_ms_per_image=statistics.median(turn.cpu_ms_per_image for turn in turns),
        kb_per_image=None if written is None else written / 1e3,
        peak_rss_mb=max(memory, default=None),
    )


def make_claims(results: Sequence[Result], manifest: ManifestResult) -> list[Claim]:
    """The figures that have a goal, and the share of the strict check's rate, which has none."""
    by_key = {(result.section, result.name): result for result in results}
    ours = {section: by_key[section, "crisp"] for section in (_UNTOUCHED, _REENCODE)}
    decoders = [result for (section, name), result in by_key.items() if section == _UNTOUCHED and name in DECODERS]
    limit = max((r for r in decoders if r.name != STRICT_CHECK), key=lambda result: result.images_per_s)

    def ratio(section: str, name: str, at_least: float | None) -> Claim:
        other = by_key[section, name]
        value = ours[section].images_per_s / other.images_per_s
        rounds = [a / b for a, b in zip(ours[section].rounds, other.rounds, strict=True)]
        return Claim(
            name=f"{section} ÷ {name}",
            value=value,
            per_round=statistics.median(rounds),
            by_cpu=other.cpu_ms_per_image / ours[section].cpu_ms_per_image,
            goal="" if at_least is None else f"≥ {at_least:g}",
            met=at_least is None or value >= at_least,
        )

    def below(name: str, value: float, goal: float) -> Claim:
        return Claim(name=name, value=value, per_round=None, by_cpu=None, goal=f"< {goal:g}", met=value < goal)

    peers = {"PIL+webdataset": 2.0, "litdata": 1.0, "MDS": 1.0}
    memory = {section: result.peak_rss_mb or 0.0 for section, result in ours.items()}
    return [
        ratio(_UNTOUCHED, limit.name, 0.85),
        ratio(_UNTOUCHED, STRICT_CHECK, None),
        *(ratio(_REENCODE, name, goal) for name, goal in peers.items() if (_REENCODE, name) in by_key),
        *(below(f"{section}: MB of a worker", peak, 300) for section, peak in memory.items()),
        below("142 M samples: open, ms", manifest.open_ms, 50),
        below("142 M samples: open cold, ms", manifest.open_cold_ms, 50),
        below("142 M samples: memory, MB", manifest.rss_increase_mb, 200),
        below("142 M samples: index, B each", manifest.index_bytes_per_sample, 40),
    ]


def tables(measured: Measured) -> list[Table]:
    """For a terminal of 80 columns."""
    about = f"{measured.images} images, {measured.workers} processes"
    titles = {
        _UNTOUCHED: f"bytes untouched: {about}",
        _REENCODE: f"short side {SHORT_SIDE}, quality {QUALITY}: {about}",
    }
    made = []
    for section, title in titles.items():
        rows = [result for result in measured.results if result.section == section]
        ours = next(result for result in rows if result.name == "crisp")
        made.append(_table(title, "", "images/s", "range", "kB each", "CPU ms", "crisp ÷ it"))
        for row in rows:
            made[-1].add_row(
                row.name,
                f"{row.images_per_s:.0f}",
                f"{row.slowest:.0f}–{row.fastest:.0f}",
                "" if row.kb_per_image is None else f"{row.kb_per_image:.1f}",
                f"{row.cpu_ms_per_image:.2f}",
                "" if row is ours else f"{ours.images_per_s / row.images_per_s:.2f}",
            )
    manifest = measured.manifest
    made.append(_table(f"{manifest.samples:,} samples, {manifest.shards:,} shards", "", "median", "worst"))
    for name, median, worst in (
        ("open, ms", manifest.open_ms, manifest.open_ms_slowest),
        ("open, index not cached, ms", manifest.open_cold_ms, manifest.open_cold_ms_slowest),
        ("samples of a random step, ms", manifest.order_ms, manifest.order_ms_slowest),
    ):
        made[-1].add_row(name, f"{median:.1f}", f"{worst:.1f}")
    made.append(_table("goals", "", "figure", "per round", "by CPU", "goal", "met"))
    for claim in measured.claims:
        met = ("yes" if claim.met else "no") if claim.goal else ""
        others = ("" if value is None else f"{value:.2f}" for value in (claim.per_round, claim.by_cpu))
        made[-1].add_row(claim.name, f"{claim.value:.2f}", *others, claim.goal, met)
    return made


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def hardware() -> str:
    """One line: processor, load, system, and the versions that decode."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("simplejpeg", "pillow"))
    load = os.getloadavg()[0]
    return f"{processor()}, load {load:.1f}, {platform.system()}, Python {platform.python_version()}, {versions}"


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(ShardBenchConfig, args=args, prog="crisp bench shard", description=__doc__)
    check_report(config.json)
    about = hardware()  # before: the load is what others do
    measured = bench_shard(config)
    console = Console()
    for table in tables(measured):
        console.print(table)
    for name, reason in measured.skipped.items():
        console.print(f"{name}: left out, {reason}", markup=False, highlight=False)
    console.print(f"{date.today()}, {about}", markup=False, highlight=False)
    write_report(config.json, config, hardware=about, measured=dataclasses.asdict(measured))


if __name__ == "__main__":
    main()
