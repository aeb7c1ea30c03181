"""What region discovery and warping cost, and how much of a region each warp mode keeps.

    crisp bench warp [--batch 64] [--channels 384] [--threads 1]        (or: python -m crisp.benchmarks.warp)

Prints tables in Markdown; `benchmarks/results/warp.md` holds a run and how to read it. The floor is one pass over the
tokens (their norms), which discovery cannot do without.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from crisp.benchmarks.machine import processor
from crisp.config import WarpMode
from crisp.geometry import compose, crop_affine, invert, resize_affine
from crisp.ops import regions as ops

GRID, PATCH_PX = 14, 16
THRESHOLD = 0.75
IMAGE_PX = (500, 375)  # width and height of the median ImageNet photograph


@dataclass(frozen=True, kw_only=True)
class WarpBenchmark:
    """Region discovery and warping, 14×14 patches to 14×14 patches."""

    batch: int = 64
    """Images (B)."""
    views: int = 2
    """Views per image (V)."""
    seeds: int = 1
    """Regions per image (K)."""
    channels: int = 384
    """Channels of a token (D)."""
    threads: int = 1
    """Threads of torch on the CPU."""
    repeats: int = 100
    """Timed calls of each row, after a tenth as many that are not."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Random tokens and crops on one device."""

    tokens: Tensor
    """[B, N, D]"""
    seeds: Tensor
    """[B, K] int64"""
    view_from_reference: Tensor
    """[V, B, 2, 3] float32"""


def random_crops(
    count: int, rng: np.random.Generator, *, scale: tuple[float, float] = (0.25, 1.0), view_px: int = GRID * PATCH_PX
) -> NDArray[np.float32]:
    """`view_from_reference` of random resized crops of one photograph, half of them flipped: [count, 2, 3].

    A window's share of the image is uniform in `scale`, its aspect log-uniform in 3/4..4/3, its place uniform; one
    that does not fit is drawn again. The reference is the whole photograph, 224×224.
    """
    width_px, height_px = IMAGE_PX
    windows: list[tuple[int, int, int, int]] = []
    while len(windows) < count:
        area, aspect = rng.uniform(*scale) * width_px * height_px, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if width <= width_px and height <= height_px:
            x, y = int(rng.integers(width_px - width + 1)), int(rng.integers(height_px - height + 1))
            windows.append((x, y, width, height))
    view_from_image = crop_affine(np.array(windows), view_px, rng.random(count) < 0.5)
    reference_from_image = resize_affine(np.array(height_px), np.array(width_px), GRID * PATCH_PX)
    return compose(view_from_image, invert(reference_from_image)).astype(np.float32)


def forward_fill(crops: int, rng: np.random.Generator) -> float:
    """Patches that mode "forward" marks, as a share of those of mode "centre"; the region is the whole reference."""
    region = torch.ones(crops, 1, GRID**2, dtype=torch.bool)
    view_from_reference = torch.from_numpy(random_crops(crops, rng))[None]

    def marked(mode: WarpMode) -> Tensor:
        _, counts = ops.warp(
            region, view_from_reference, reference_grid=GRID, view_grid=GRID, patch_px=PATCH_PX, mode=mode
        )
        return counts.sum()

    return float(marked("forward") / marked("centre"))


def make_inputs(config: WarpBenchmark, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Tokens around one vector per image, so that a threshold of .75 cuts regions of middling size."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(config.batch, 1, config.channels, generator=generator)
    noise = torch.randn(config.batch, GRID**2, config.channels, generator=generator)
    strength = torch.rand(config.batch, GRID**2, 1, generator=generator)
    crops = random_crops(config.views * config.batch, np.random.default_rng(0))
    return Inputs(
        tokens=(shared + strength * noise).to(device, dtype),
        seeds=torch.randint(GRID**2, (config.batch, config.seeds), generator=generator).to(device),
        view_from_reference=torch.from_numpy(crops).unflatten(0, (config.views, config.batch)).to(device),
    )


def calls(inputs: Inputs, implementation: ops.Implementation) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    regions = ops.discover(inputs.tokens, inputs.seeds, threshold=THRESHOLD, implementation=implementation)

    def warp(mode: WarpMode) -> Callable[[], object]:
        return lambda: ops.warp(
            regions,
            inputs.view_from_reference,
            reference_grid=GRID,
            view_grid=GRID,
            patch_px=PATCH_PX,
            mode=mode,
            implementation=implementation,
        )

    modes: tuple[WarpMode, ...] = ("centre",) if implementation == "triton" else get_args(WarpMode)
    return {
        "floor: norms of the tokens": lambda: torch.linalg.vector_norm(inputs.tokens, dim=-1, dtype=torch.float32),
        "discover": lambda: ops.discover(
            inputs.tokens, inputs.seeds, threshold=THRESHOLD, implementation=implementation
        ),
        **{f"warp, {mode}": warp(mode) for mode in modes},
        "discover_and_warp": lambda: ops.discover_and_warp(
            inputs.tokens,
            inputs.seeds,
            inputs.view_from_reference,
            threshold=THRESHOLD,
            reference_grid=GRID,
            view_grid=GRID,
            patch_px=PATCH_PX,
            implementation=implementation,
        ),
    }


def time_ms(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls, launch included."""
    times = []
    for index in range(-(repeats // 10) - 1, repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= 0:
            times.append((time.perf_counter() - start_s) * 1e3)
    return times


def table(config: WarpBenchmark, device: torch.device, implementation: ops.Implementation) -> list[str]:
    """Rows of one device and implementation, for float32 and bfloat16 tokens."""
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, call in calls(make_inputs(config, device, dtype), implementation).items():
            times = time_ms(call, device, config.repeats)
            low, median, high = np.percentile(times, (5, 50, 95))
            kind = str(dtype).removeprefix("torch.")
            lines.append(
                f"| {device.type} | {implementation} | {kind} | {name} | {median:.3f} | {low:.3f}–{high:.3f} |"
            )
    return lines


def hardware(threads: int) -> str:
    """One line: processor, threads, GPU, torch."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{processor()}, threads {threads}; {gpu}; torch {torch.__version__}"


def main(args: Sequence[str] | None = None) -> None:
    """Time every form that runs here, and print; `args` as on the command line."""
    config = tyro.cli(WarpBenchmark, args=args, prog="crisp bench warp")
    torch.set_num_threads(config.threads)
    print(hardware(config.threads))
    print(f"B={config.batch} V={config.views} K={config.seeds} D={config.channels}, {GRID}×{GRID} → {GRID}×{GRID}\n")
    print("| device | form | tokens | call | median ms | 5–95 % |\n|---|---|---|---|---|---|")
    print("\n".join(table(config, torch.device("cpu"), "torch")))
    if torch.cuda.is_available():
        print("\n".join(table(config, torch.device("cuda"), "torch")))
        print("\n".join(table(config, torch.device("cuda"), "triton")))
    else:
        print("\nTriton, and torch on CUDA: not measured on a GPU, there is none here.")
    fills = [forward_fill(1000, np.random.default_rng(seed)) for seed in range(5)]
    print(
        f"\nMode forward marks {statistics.mean(fills):.1%} (± {statistics.stdev(fills):.1%} over five draws of 1,000 "
        f"crops at scale .25–1) of the patches that mode centre marks."
    )


if __name__ == "__main__":
    main()
