"""What the CPU renderer could reach at most, by its parts; and how it grows with threads. Arithmetic alone.

A renderer that only decodes and runs its kernels makes 1 / Σ(1 / rate of a part) samples per second; what is missing to
that are reading, planning and handing over. `loader_parts` measures the parts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of the CPU renderer alone, on all threads."""

    samples_per_s: float
    cpu_ms_per_sample: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceiling:
    """The CPU renderer against the sum of its parts."""

    parts: dict[str, Part]
    samples_per_s: float
    """What they allow together"""
    cpu_ms_per_sample: float
    """What they take together"""
    share: float
    """Of `samples_per_s`, reached by the renderer with its loader"""
    share_by_cpu: float
    """The parts' processor time ÷ that of the renderer and its loader"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """How rates grow from one thread to `threads`."""

    threads: int
    cpu_one_thread: float
    """Samples per second"""
    cpu: float
    """Rate on all threads ÷ rate on one"""
    decode_only_one_thread: float
    decode_only: float
    ratio: float
    """Of the renderer's growth to bare decoding's"""


def sum_of_parts(rates: Iterable[float]) -> float:
    """Samples per second of doing each part in turn, from those of each alone."""
    return 1 / sum(1 / rate for rate in rates)


def make_ceiling(parts: Mapping[str, Part], *, samples_per_s: float, cpu_ms_per_sample: float) -> Ceiling:
    """From the parts, and what the renderer reaches with its loader."""
    limit = sum_of_parts(part.samples_per_s for part in parts.values())
    cpu_ms = sum(part.cpu_ms_per_sample for part in parts.values())
    return Ceiling(
        parts=dict(parts),
        samples_per_s=limit,
        cpu_ms_per_sample=cpu_ms,
        share=samples_per_s / limit,
        share_by_cpu=cpu_ms / cpu_ms_per_sample,
    )


def make_scaling(*, threads: int, cpu: tuple[float, float], decode_only: tuple[float, float]) -> Scaling:
    """From samples per second on (one thread, all threads)."""
    cpu_growth, decode_growth = cpu[1] / cpu[0], decode_only[1] / decode_only[0]
    return Scaling(
        threads=threads,
        cpu_one_thread=cpu[0],
        cpu=cpu_growth,
        decode_only_one_thread=decode_only[0],
        decode_only=decode_growth,
        ratio=cpu_growth / decode_growth,
    )
