"""What the order and the plan of a batch cost, in one thread, before anything is read or rendered.

    crisp bench plan [--batch 64] [--repeats 500]        (or: python -m crisp.benchmarks.plan)

Prints a table in Markdown; `benchmarks/results/plan.md` holds a run, how to read it and what was tried. Each call is of
another step, so that no result is computed twice.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numba
import numpy as np
import tyro
from numpy.typing import NDArray

from crisp.benchmarks.machine import processor
from crisp.config import ViewsConfig
from crisp.masking import patch_masks
from crisp.pipelines.order import EpochLayout, global_batch_samples, rank_slots
from crisp.pipelines.plan import Plan, affines, appearance, color_matrix, crop_windows, make_plan, region_seeds

TARGET_MS = 3.0


@dataclass(frozen=True, kw_only=True)
class PlanBenchmark:
    """Order and plan of one rank's batch."""

    batch: int = 64
    """Images of this rank (B)."""
    ranks: int = 16
    """Ranks of the run; the global batch is their number × `batch`."""
    shards: int = 1282
    """Shards of about 1,000 samples; 1,282 is ImageNet-1K."""
    repeats: int = 500
    """Timed calls of each row, after a tenth as many that are not."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """The recipe."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A data set, and the sizes of a batch's images."""

    layout: EpochLayout
    slots: NDArray[np.int64]
    """[B] of rank 0"""
    height_px: NDArray[np.int64]
    """[B]"""
    width_px: NDArray[np.int64]
    """[B]"""


def make_inputs(config: PlanBenchmark) -> Inputs:
    """Shards of uneven sizes; photographs of 300 to 500 by 300 to 500 pixels, both ways round."""
    rng = np.random.default_rng(0)
    layout = EpochLayout(
        shard_samples=rng.integers(900, 1100, config.shards),
        global_batch=config.batch * config.ranks,
        parts=8 if config.batch * config.ranks % 8 == 0 else 1,
        window_shards=16,
        seed=0,
    )
    height_px, width_px = rng.integers(300, 501, (2, config.batch))
    return Inputs(
        layout=layout,
        slots=rank_slots(layout.global_batch, rank=0, world_size=config.ranks),
        height_px=height_px,
        width_px=width_px,
    )


def calls(config: PlanBenchmark, inputs: Inputs) -> dict[str, Callable[[int], object]]:
    """What is timed, by name, as functions of a repeat's number."""
    layout, views = inputs.layout, config.views
    size = {"height_px": inputs.height_px, "width_px": inputs.width_px}

    def order(i: int) -> NDArray[np.int64]:
        return global_batch_samples(layout, 0, i % layout.steps_per_epoch, inputs.slots)

    def plan(i: int) -> Plan:
        return make_plan(views, seed=0, epoch=0, sample_id=order(i), **size)

    some = plan(0)
    ids = some.sample_id

    return {
        "order": order,
        "crop windows": lambda i: crop_windows(views, seed=0, epoch=0, sample_id=ids + i, **size),
        "flip, colour factors, blur, solarise": lambda i: appearance(views, seed=0, epoch=0, sample_id=ids + i),
        "colour matrices": lambda i: color_matrix(some.color_factors),
        "affines": lambda i: affines(views, crop_px=some.crop_px, flip=some.flip, **size),
        "patch masks": lambda i: patch_masks(views, seed=0, epoch=0, sample_id=ids + i),
        "region seeds": lambda i: region_seeds(views, seed=0, epoch=0, sample_id=ids + i, crop_px=some.crop_px, **size),
        "**order and plan**": plan,
    }


def time_ms(call: Callable[[int], object], repeats: int) -> NDArray[np.float64]:
    """[repeats, 2] milliseconds of each call: by the clock, and of this thread's processor time."""
    times = []
    for i in range(-(repeats // 10) - 1, repeats):
        start_s = time.perf_counter(), time.thread_time()
        call(abs(i))
        if i >= 0:
            times.append((time.perf_counter() - start_s[0], time.thread_time() - start_s[1]))
    return np.array(times) * 1e3


def hardware() -> str:
    """One line: processor, cores, versions."""
    return f"{processor()}, one thread; NumPy {np.__version__}, Numba {numba.__version__}"


def main(args: Sequence[str] | None = None) -> None:
    """Time the whole and its parts, and print; `args` as on the command line."""
    config = tyro.cli(PlanBenchmark, args=args, prog="crisp bench plan")
    inputs = make_inputs(config)
    start_s = time.perf_counter()
    timed = calls(config, inputs)
    first_s = time.perf_counter() - start_s

    print(hardware())
    print(
        f"B={config.batch} of G={inputs.layout.global_batch}, V={config.views.views}, masks {config.views.mask_shape}, "
        f"seeds {config.views.seed_policy}, {inputs.layout.samples} samples in {config.shards} shards\n"
    )
    print("| part | median ms | 5–95 % | median CPU ms |\n|---|---|---|---|")
    for name, call in timed.items():
        clock, cpu = time_ms(call, config.repeats).T
        low, median, high = np.percentile(clock, (5, 50, 95))
        print(f"| {name} | {median:.3f} | {low:.3f}–{high:.3f} | {np.median(cpu):.3f} |")
    print(
        f"\nTarget: {TARGET_MS:g} ms for 64 samples of 12 views. The first call took {first_s:.2f} s (compiled code)."
    )


if __name__ == "__main__":
    main()
