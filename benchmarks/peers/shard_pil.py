"""What the peers' scripts share: command line, list of files, transform, processes, clock.

Imports nothing of crisp: the scripts run under an interpreter that may not have it. The clock runs from before the
files are listed until all is written; the start of the interpreter and imports come before it, that of the worker
processes falls into it. They are forked, which costs next to nothing and hands them what has been imported.
"""

import argparse
import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the command line says."""

    images: Path
    """Folder of class folders of JPEGs"""
    out: Path
    workers: int
    short_side: int
    quality: int


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One image, ready to be stored."""

    data: bytes
    source: str
    """Class folder and name: no path from here, for litdata stores what a string that is one leads to"""
    height: int
    width: int


def files_and_labels(images: Path) -> list[tuple[str, int]]:
    """Every file below the class folders, and the number of its class."""
    classes = sorted(folder for folder in images.iterdir() if folder.is_dir())
    return [(str(file), label) for label, folder in enumerate(classes) for file in sorted(folder.iterdir())]


def smaller(file: str, work: Work) -> Encoded:
    """With PIL: bicubic to the short side, as JPEG. An image that is small enough keeps its bytes, as with crisp."""
    source = "/".join(Path(file).parts[-2:])
    with Image.open(file) as image:
        width, height = image.size
        scale = work.short_side / min(width, height)
        if scale >= 1:
            return Encoded(data=Path(file).read_bytes(), source=source, height=height, width=width)
        width, height = round(width * scale), round(height * scale)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=work.quality)
    return Encoded(data=buffer.getvalue(), source=source, height=height, width=width)


def every_nth_file(write: Callable[[Work, int, list[tuple[str, int]]], None], work: Work) -> int:
    """Have each of W processes write every W-th file; the number of files.

    Args:
        write: called in each process with the work, the number of the process and its files.
        work: the work.
    """
    files = files_and_labels(work.images)
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=write, args=(work, number, files[number :: work.workers])) for number in range(work.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a worker failed")
    return len(files)


def run(contender: Callable[[Work], int]) -> None:
    """Time a contender, which returns the number of images; the last line that is printed says both.

    Processor time is that of this process and of all that it has waited for.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    for name in ("--workers", "--short-side", "--quality"):
        parser.add_argument(name, type=int, required=True)
    work = Work(**vars(parser.parse_args()))
    start_s, cpu_start_s = time.perf_counter(), sum(os.times()[:4])
    images = contender(work)
    seconds, cpu_s = time.perf_counter() - start_s, sum(os.times()[:4]) - cpu_start_s
    print(json.dumps({"images": images, "seconds": seconds, "cpu_seconds": cpu_s}), flush=True)
