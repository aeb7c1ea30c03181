"""What `crisp bench loader` says in a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from crisp.benchmarks.loader import Measured
from crisp.benchmarks.loader_backends import BACKENDS
from crisp.benchmarks.loader_ceiling import Ceiling, Part
from crisp.benchmarks.loader_turn import QUIET_CORES

DIFFERENCES = (
    "What differs. torchvision-pil, webdataset-pil, torchvision-v2 and spdl make no masks, seeds and affines, which "
    "cpu and dali make; their colour is in HSV with contrast about the image's mean (ours: one YIQ matrix, contrast "
    "about the middle grey), and blur comes after it (ours: before). PIL's blur is three box filters, v2's is cut off "
    "at 9 px (ours: the Gaussian up to 3σ). dali-random has our colour, and no masks, seeds and affines. All resizes "
    "are antialiased. The folder's images come out of the page cache; so do shards that fit into it."
)


def results_table(measured: Measured) -> Table:
    """The results, each against the faster PIL loader where one was measured."""
    compared = any(result.times_pil is not None for result in measured.results)
    table = Table(
        title="loader",
        caption=DIFFERENCES if compared else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("backend", no_wrap=True)
    for heading in ("samples/s", "range", "CPU\nms each", "CPU\nshare", "first\nbatch, s", "peak\nMB", "× PIL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in measured.results:
        table.add_row(
            result.backend if result.device == "cpu" else f"{result.backend} (GPU)",
            f"{result.samples_per_s:.0f}",
            f"{result.slowest:.0f}–{result.fastest:.0f}",
            f"{result.cpu_ms_per_sample:.2f}",
            f"{result.cpu_share:.0%}",
            "" if result.first_batch_s is None else f"{result.first_batch_s:.1f}",
            f"{result.peak_mb:.0f}",
            "" if result.times_pil is None or BACKENDS[result.backend].ceiling else f"{result.times_pil:.1f}",
        )
    return table


def ceiling_table(measured: Measured) -> Table | None:
    """The parts of the CPU renderer and their sum."""
    if measured.ceiling is None:
        return None
    table = Table(title="the parts of cpu, each alone")
    table.add_column("part")
    for heading in ("samples/s", "CPU ms each"):
        table.add_column(heading, justify="right")
    rows: dict[str, Part | Ceiling] = {**measured.ceiling.parts, "one after another": measured.ceiling}
    for name, row in rows.items():
        table.add_row(name, f"{row.samples_per_s:.0f}", f"{row.cpu_ms_per_sample:.2f}")
    return table


def claims_table(measured: Measured) -> Table | None:
    """The figures that have a goal."""
    if not measured.claims:
        return None
    table = Table(title="goals")
    table.add_column("")
    for heading in ("figure", "per round", "by CPU", "goal", "met"):
        table.add_column(heading, justify="right")
    for claim in measured.claims:
        figures = (claim.value, claim.per_round, claim.by_cpu)
        texts = ("" if figure is None else f"{figure:.2f}" for figure in figures)
        table.add_row(claim.name, *texts, f"≥ {claim.goal:g}", "yes" if claim.met else "no")
    return table


def print_measured(measured: Measured, console: Console) -> None:
    """All of it."""
    for table in (results_table(measured), ceiling_table(measured), claims_table(measured)):
        if table is not None:
            console.print(table)
    if measured.ceiling is not None:
        console.print(
            f"cpu reaches {measured.ceiling.share:.0%} of its own ceiling, the sum of its parts "
            f"({measured.ceiling.share_by_cpu:.0%} by CPU time)"
        )
    if (scaling := measured.scaling) is not None:
        console.print(
            f"1→{scaling.threads} threads: cpu {scaling.cpu:.2f}×, decode-only {scaling.decode_only:.2f}×, "
            f"ratio {scaling.ratio:.2f}"
        )
    disturbed = {r.backend: r.cores_of_others for r in measured.results if r.cores_of_others > QUIET_CORES}
    if disturbed:
        worst = max(disturbed, key=disturbed.__getitem__)
        console.print(
            f"other processes took up to {disturbed[worst]:.1f} cores meanwhile ({worst}): rates are too low; compare "
            f"CPU times, or measure again on a quiet machine"
        )
    for name, reason in measured.skipped.items():
        console.print(f"{name}: left out, {reason}", markup=False, highlight=False)
