"""k-NN over a bank of labelled patches against the plain chunked form, and its memory on a bank of full size.

    crisp bench knn [--keys 200000] [--queries 4096] [--rounds 5] [--full 5170000] [--json FILE]
                                                                              (or: python -m crisp.benchmarks.knn)

Both forms answer the same queries for k = 1, 3, 10, 30 and both distances, in turns in one process, on features of
clusters and random labels. The plain form (`predict_pixels_plain`) makes the matrix of distances of a chunk, takes the
nearest, gathers their labels and sorts each pixel's. Times are of the process's own processor, so that what else runs
on the machine counts little; a ratio is of two turns of one round. Predictions are compared with the plain form in
float32, and in float64, which has no rounding to speak of. `results/knn.md` has figures.
"""

import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import tyro
from torch import Tensor

from crisp.benchmarks.intervals import median_interval
from crisp.benchmarks.machine import hardware
from crisp.benchmarks.report_file import check_report, write_report
from crisp.distributed import pick_device
from crisp.errors import CrispError
from crisp.evals.segmentation.neighbours import DISTANCES, KEY_CHUNK, QUERY_CHUNK, multiplies_bfloat16, nearest
from crisp.evals.segmentation.topk import pixel_modes, predict_pixels_grid, predict_pixels_plain

KS = (1, 3, 10, 30)
CLASSES = 150
CLUSTERS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnBenchConfig:
    """Measure the k-NN of segmentation."""

    keys: int = 200_000
    """Patches in the bank."""
    queries: int = 4096
    """Patches to label."""
    width: int = 384
    """Width of the features."""
    patch_px: int = 16
    """Side of a patch."""
    rounds: int = 5
    """Turns of each form."""
    parts: int = 2
    """Turns of their parts, and of variants."""
    threads: int = 1
    """Of torch. With more, processor time holds waiting, too."""
    device: str = "cpu"
    """cpu or cuda; on cuda wall time is taken."""
    exact: bool = True
    """Also compare with the plain form in float64, once."""
    full: int = 0
    """Patches of a bank on disk that 256 queries are compared with, for the peak of memory; 5170000 is ADE20K's."""
    folder: Path = Path(tempfile.gettempdir())
    """Where that bank is written, and removed from."""
    json: Path | None = None
    """Also write configuration, machine and results here."""

    def __post_init__(self) -> None:
        for name in ("keys", "queries", "width", "patch_px", "rounds", "parts", "threads"):
            if getattr(self, name) < 1:
                raise CrispError(f"{name}={getattr(self, name)}: must be positive")
        if self.keys < max(KS) or 0 < self.full < max(KS):
            raise CrispError(f"keys={self.keys}, full={self.full}: k = {max(KS)} needs as many patches")


def make_features(count: int, width: int, seed: int) -> Tensor:
    """[count, width] float32 around `CLUSTERS` centres, which are the same for all seeds."""
    centres = 0.7 * torch.randn(CLUSTERS, width, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=draw)
    return features.add_(centres[torch.randint(CLUSTERS, (count,), generator=draw)])


def make_labels(count: int, pixels: int, seed: int) -> Tensor:
    """[count, pixels] uint8: one class for most of a patch, others for a fifth of its pixels."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count, 1), generator=draw, dtype=torch.uint8).repeat(1, pixels)
    others = torch.randint(CLASSES, (count, pixels // 5), generator=draw, dtype=torch.uint8)
    labels[:, : pixels // 5] = others
    return labels


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, float, Any]:
    """Processor and wall seconds of a call, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall_s = time.perf_counter() - start_s
    return (wall_s if device.type == "cuda" else time.process_time() - cpu_start_s), wall_s, result


def differing(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> int:
    """Pixels predicted differently, over all k and distances."""
    return sum(int((one[key] != other[key]).sum()) for key in one)


def compare(config: KnnBenchConfig, device: torch.device) -> dict[str, Any]:
    """Rounds of both forms, and of the parts of the fast one; prints a table."""
    bank = make_features(config.keys, config.width, 1).to(device)
    queries = make_features(config.queries, config.width, 2).to(device)
    labels = make_labels(config.keys, config.patch_px**2, 3)

    def plain(dtype: torch.dtype = torch.float32) -> dict[Any, Tensor]:
        found = {}
        for distance in DISTANCES:
            predicted = predict_pixels_plain(queries, bank, labels, ks=KS, distance=distance, dtype=dtype)
            found.update({(k, distance): pixels for k, pixels in predicted.items()})
        return found

    def plain_search() -> None:
        for distance in DISTANCES:
            predict_pixels_plain(queries, bank, labels[:, :1], ks=KS[-1:], distance=distance)

    def plain_votes() -> None:
        for _ in DISTANCES:
            for part in few.split(128):
                for k in KS:
                    part[:, :k].mode(dim=1)

    def votes() -> None:
        for _ in DISTANCES:
            pixel_modes(few, KS)

    few = labels[torch.randint(config.keys, (QUERY_CHUNK, max(KS)), generator=torch.Generator().manual_seed(4))]
    forms: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "fast": lambda: predict_pixels_grid(queries, bank, labels, ks=KS),
        "plain, search alone": plain_search,
        "fast, search alone": lambda: nearest(queries, bank, k=max(KS)),
        "fast, search alone, screened in float32": lambda: nearest(queries, bank, k=max(KS), screen=torch.float32),
        "fast, search alone, one distance": lambda: nearest(queries, bank, k=max(KS), distances=("cosine",)),
        "plain, votes of 1,024 queries alone": plain_votes,
        "fast, votes of 1,024 queries alone": votes,
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    walls: dict[str, list[float]] = {name: [] for name in forms}
    results: dict[str, Any] = {}
    for turn in range(config.rounds):
        names = list(forms) if turn < config.parts else list(forms)[:2]
        names = names if turn % 2 == 0 else names[::-1]
        for name in names:
            spent_s, wall_s, results[name] = timed(forms[name], device)
            times[name].append(spent_s)
            walls[name].append(wall_s)
    print("\n| form | processor s, median | least–most | wall s, median |\n|---|---|---|---|")
    for name, values in times.items():
        print(
            f"| {name} | {statistics.median(values):.2f} | {min(values):.2f}–{max(values):.2f} "
            f"| {statistics.median(walls[name]):.2f} |"
        )
    ratios = {}
    pairs = (
        ("all", "plain", "fast"),
        ("search", "plain, search alone", "fast, search alone"),
        ("votes", "plain, votes of 1,024 queries alone", "fast, votes of 1,024 queries alone"),
    )
    print("\nPlain ÷ fast, by round, median and interval:")
    for what, slow, fast in pairs:
        ratio = median_interval([s / f for s, f in zip(times[slow], times[fast], strict=True)])
        ratios[what] = {"median": ratio.median, "low": ratio.low, "high": ratio.high, "confidence": ratio.confidence}
        print(f"  {what}: {ratio} at {ratio.confidence:.0%}")
    pixels = sum(tensor.numel() for tensor in results["fast"].values())
    different = {"float32": differing(results["fast"], results["plain"])}
    print(f"\nPredictions that differ, of {pixels:,}:\n  fast and plain in float32: {different['float32']:,}")
    if config.exact:
        exact = plain(torch.float64)
        different["float64"] = differing(results["fast"], exact)
        different["plain float32 and float64"] = differing(results["plain"], exact)
        print(f"  fast and plain in float64: {different['float64']:,}")
        print(f"  plain in float32 and plain in float64: {different['plain float32 and float64']:,}")
    return {"processor_s": times, "wall_s": walls, "ratios": ratios, "pixels": pixels, "different": different}


def full_bank(config: KnnBenchConfig, device: torch.device) -> dict[str, Any]:
    """256 queries against a bank of full size in memory maps; prints the peaks of memory."""
    pixels, queries = config.patch_px**2, make_features(256, config.width, 2).to(device)
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        features_file, labels_file = Path(folder, "features.npy"), Path(folder, "labels.npy")
        shapes = ((features_file, np.float32, config.width), (labels_file, np.uint8, pixels))
        features, labels = (
            np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=(config.full, width))
            for path, dtype, width in shapes
        )
        for start in range(0, config.full, KEY_CHUNK):
            count = min(KEY_CHUNK, config.full - start)
            features[start : start + count] = make_features(count, config.width, start + 10).numpy()
            labels[start : start + count] = make_labels(count, pixels, start + 11).numpy()
        del features, labels
        mapped = (np.load(path, mmap_mode="r") for path in (features_file, labels_file))
        with OwnMemory() as own:
            spent_s, wall_s, _ = timed(lambda: predict_pixels_grid(queries, *mapped, ks=KS), device)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    bank_gb = config.full * (config.width * 4 + pixels) / 1e9
    print(
        f"\n256 queries against {config.full:,} × {config.width} patches ({bank_gb:.1f} GB on disk): "
        f"{spent_s:.0f} s of processor, {wall_s:.0f} s; own memory {own.before_gb:.2f} GB before, at most "
        f"{own.peak_gb:.2f} GB; peak resident {peak_gb:.2f} GB, pages of the mapped bank included, which the "
        f"system takes back when it needs them"
    )
    return {
        "processor_s": spent_s,
        "wall_s": wall_s,
        "own_before_gb": own.before_gb,
        "own_peak_gb": own.peak_gb,
        "peak_rss_gb": peak_gb,
    }


class OwnMemory:
    """Peak of this process's memory without what is mapped from files, looked at every 20 ms while the block runs."""

    def __enter__(self) -> Self:
        self.before_gb = self.peak_gb = self._now_gb()
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self.peak_gb = max(self.peak_gb, self._now_gb())

    @staticmethod
    def _now_gb() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e6


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print; `args` as on the command line."""
    config = tyro.cli(KnnBenchConfig, args=args, prog="crisp bench knn")
    check_report(config.json)
    torch.set_num_threads(config.threads)
    device = pick_device(config.device, 0)
    print(f"{hardware()}; threads {config.threads}")
    print(
        f"{config.queries:,} queries, {config.keys:,} × {config.width} patches, k = {KS}, {', '.join(DISTANCES)}, "
        f"{config.patch_px}² pixels; screened in {'bfloat16' if multiplies_bfloat16(device) else 'float32'}"
    )
    measured: dict[str, Any] = {"compared": compare(config, device)}
    if config.full:
        measured["full"] = full_bank(config, device)
    write_report(config.json, config, hardware=hardware(), measured=measured)


if __name__ == "__main__":
    main()
