"""The measures and the random regions as their definitions say, image by image, pixel by pixel, in plain Python."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.uint8]
"""[H, W]"""


def patch_of(pixel: tuple[int, int], patch_px: int, grid: int) -> int:
    return pixel[0] // patch_px * grid + pixel[1] // patch_px


def pixels_of(patches: set[int], patch_px: int, grid: int) -> set[tuple[int, int]]:
    return {
        (patch // grid * patch_px + dy, patch % grid * patch_px + dx)
        for patch in patches
        for dy in range(patch_px)
        for dx in range(patch_px)
    }


def patch_label(labels: Labels, patch: int, patch_px: int, grid: int) -> int:
    counts = Counter(int(labels[pixel]) for pixel in pixels_of({patch}, patch_px, grid))
    most = max(counts.values())
    return min(label for label, count in counts.items() if count == most)


def boundary(inside: set[tuple[int, int]], labels: Labels, ignored: Sequence[int]) -> set[tuple[int, int]]:
    height, width = labels.shape
    found = set()
    for y in range(height):
        for x in range(width):
            for other in ((y, x + 1), (y + 1, x)):
                if other[0] == height or other[1] == width or int(labels[y, x]) in ignored:
                    continue
                if int(labels[other]) not in ignored and ((y, x) in inside) != (other in inside):
                    found.add((y, x))
    return found


def near(pixel: tuple[int, int], others: set[tuple[int, int]], tolerance_px: int) -> bool:
    reach = range(-tolerance_px, tolerance_px + 1)
    return any((pixel[0] + dy, pixel[1] + dx) in others for dy in reach for dx in reach)


def measures(
    labels: Labels, region: set[int], seed: int, *, patch_px: int, ignored: Sequence[int], tolerance_px: int
) -> dict[str, float | None]:
    """Of one region of one image; None where a measure is not defined."""
    grid = len(labels) // patch_px
    of_patch = {patch: patch_label(labels, patch, patch_px, grid) for patch in range(grid * grid)}
    size = len(region) / grid**2
    own = of_patch[seed]
    if own in ignored:
        names = ("purity", "purity-px", "overlap", "overlap-px", "boundary-recall", "boundary-precision")
        return {**dict.fromkeys(names), "size": size}

    patches = {patch for patch in region if of_patch[patch] not in ignored}
    pixels = {pixel for pixel in pixels_of(region, patch_px, grid) if int(labels[pixel]) not in ignored}
    overlap, overlap_px = 0.0, 0.0
    for label in set(labels.ravel().tolist()) - set(ignored):
        segment = {patch for patch in of_patch if of_patch[patch] == label}
        segment_px = {(y, x) for y, x in np.argwhere(labels == label).tolist()}
        overlap = max(overlap, len(patches & segment) / len(patches | segment))
        overlap_px = max(overlap_px, len(pixels & segment_px) / len(pixels | segment_px))
    true = boundary({(y, x) for y, x in np.argwhere(labels == own).tolist()}, labels, ignored)
    ours = boundary(pixels_of(region, patch_px, grid), labels, ignored)
    recalled = [near(pixel, ours, tolerance_px) for pixel in true]
    precise = [near(pixel, true, tolerance_px) for pixel in ours]
    return {
        "purity": sum(of_patch[patch] == own for patch in patches) / len(patches),
        "purity-px": sum(int(labels[pixel]) == own for pixel in pixels) / len(pixels),
        "overlap": overlap,
        "overlap-px": overlap_px,
        "boundary-recall": sum(recalled) / len(recalled) if recalled else None,
        "boundary-precision": sum(precise) / len(precise) if precise else None,
        "size": size,
    }


def blob(seed: int, size: int, draws: Sequence[float], grid: int) -> set[int]:
    """Take a drawn patch of those that wait, let its neighbours wait; the last one fills the gap in the queue."""
    waiting, met, taken = [seed], {seed}, set()
    for draw in draws[:size]:
        position = int(draw * len(waiting))
        patch, last = waiting[position], waiting.pop()
        if position < len(waiting):
            waiting[position] = last
        taken.add(patch)
        row, column = divmod(patch, grid)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < grid and 0 <= c < grid and r * grid + c not in met:
                met.add(r * grid + c)
                waiting.append(r * grid + c)
    return taken


def scattered(seed: int, size: int, draws: Sequence[float]) -> set[int]:
    others = sorted((draw, patch) for patch, draw in enumerate(draws) if patch != seed)
    return {seed} | {patch for _, patch in others[: size - 1]}


def is_connected(region: set[int], grid: int) -> bool:
    reached, waiting = set(), [min(region)]
    while waiting:
        patch = waiting.pop()
        if patch in reached or patch not in region:
            continue
        reached.add(patch)
        row, column = divmod(patch, grid)
        steps = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
        waiting += [r * grid + c for r, c in steps if 0 <= r < grid and 0 <= c < grid]
    return reached == region
