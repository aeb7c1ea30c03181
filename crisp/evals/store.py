"""Features that are extracted once: arrays on disk, which an interrupted evaluation goes on filling.

One folder per key below the cache's root, named by the key's digest:

    key.json         what the values depend on, with the arrays' shapes: for people, and to notice a mix-up
    FIELD.npy        the arrays, at full size from the start
    done-RANK.txt    one line per chunk that is whole: first item, one past the last, CRC-32 of each field's bytes
    lock             held by whoever computes

A chunk gets its line after its bytes have reached the disk, so what a crash leaves behind is computed again, never
read. Before any use, all bytes are held against their CRCs.
"""

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crisp.distributed import World, gather_over_ranks
from crisp.errors import CrispError
from crisp.evals.bar import bar
from crisp.evals.running import from_main, together
from crisp.evals.store_entry import Done, Entry, Field, Span, key_text
from crisp.progress import describe_time

__all__ = ["FeatureStore", "Field"]

log = logging.getLogger(__name__)

Json = Any
"""What JSON can hold: str, int, float, bool, None, lists and string-keyed mappings of these"""
Compute = Callable[[range], Mapping[str, NDArray[Any]]]
"""Item numbers → for each field an array [len(range), *shape]"""


class FeatureStore:
    """Arrays by what they depend on, below one folder.

    Args:
        root: made when something is stored. For ranks on several nodes it must be on a file system that all see.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, key: Mapping[str, Json], count: int, fields: Mapping[str, Field]) -> Path:
        """Where the arrays of this key lie, or will."""
        return self._entry(key, count, fields).folder

    def arrays(
        self,
        key: Mapping[str, Json],
        count: int,
        fields: Mapping[str, Field],
        compute: Compute,
        *,
        chunk: int,
        world: World,
        title: str,
    ) -> Mapping[str, NDArray[Any]]:
        """The arrays of `count` items, computed where they are not on disk yet. Collective: all ranks call it.

        Each rank computes chunks of its own and writes them as it has them. `chunk` and the number of ranks may differ
        from those of the run that is continued. Costs one reading of what is there, for the CRCs.

        Args:
            key: everything that the values depend on: fingerprints of weights and data, resolution, precision, …
            count: number of items, at least 1.
            fields: the arrays by name; the name becomes a file's.
            compute: makes the items of a chunk. Floats must be finite. Its arrays are written while the next chunk is
                computed, so it makes new ones each time.
            chunk: items per call of `compute`; an interruption loses two chunks per rank at most.
            world: this rank's.
            title: what is computed, for the progress bar and for errors: `ADE20K train, DINO ViT-S/16`.

        Returns:
            Each field as a read-only memory map [count, *shape].

        Raises:
            CrispError: the disk is full or cannot be written, the folder is damaged, another process computes the
                same, or a value is not finite.
        """
        if count < 1 or chunk < 1:
            raise ValueError(f"count={count}, chunk={chunk}: must be at least 1")
        entry = self._entry(key, count, fields)
        with ExitStack() as held:
            done, lacking = from_main(world, lambda: _look(entry, chunk))
            if lacking:
                done, lacking = from_main(world, lambda: _take(entry, chunk, held))
            together(entry.check)
            together(lambda: entry.verify(done[world.rank :: world.size]))
            if lacking:
                self._fill(entry, lacking, compute, world, title)
                gather_over_ranks(None)  # every rank has written what it was to
            return entry.open()

    def _entry(self, key: Mapping[str, Json], count: int, fields: Mapping[str, Field]) -> Entry:
        text = key_text(key, count, fields)
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        return Entry(folder=self.root / digest, text=text, count=count, fields=dict(fields))

    def _fill(self, entry: Entry, lacking: Sequence[Span], compute: Compute, world: World, title: str) -> None:
        items = sum(stop - start for start, stop in lacking)
        if world.is_main:
            log.info("%s: %d of %d computed before, in %s", title, entry.count - items, entry.count, entry.folder)
        began_s = time.monotonic()
        with (
            entry.writer(world.rank) as write,
            ThreadPoolExecutor(1) as pool,
            # The other ranks are taken to be as fast as this one.
            bar(title, items, silent=not world.is_main) as advance,
        ):
            writing: Future[None] | None = None  # of the chunk before, while this one is computed
            for start, stop in lacking[world.rank :: world.size]:
                chunk = _checked(compute(range(start, stop)), start, stop, entry.fields, title)
                if writing is not None:
                    writing.result()
                writing = pool.submit(write, start, chunk)
                advance((stop - start) * world.size)
            if writing is not None:
                writing.result()
        if world.is_main:
            log.info("%s: computed in %s", title, describe_time(time.monotonic() - began_s))


def _look(entry: Entry, chunk: int) -> tuple[list[Done], list[Span]]:
    """What is there and what is lacking, without writing: a cache that is whole may be read-only."""
    done = entry.done() if entry.exists() else []
    return done, gaps(done, entry.count, chunk)


def _take(entry: Entry, chunk: int, held: ExitStack) -> tuple[list[Done], list[Span]]:
    """Keep others away until `held` is closed, make the files if there are none, and look again."""
    held.enter_context(entry.locked())
    if not entry.exists():
        entry.create()
    return _look(entry, chunk)


def gaps(done: Sequence[Done], count: int, chunk: int) -> list[Span]:
    """The spans of [0, count) that no chunk covers, cut into pieces of at most `chunk` items, in order."""
    edges = [(0, 0), *sorted((d.start, d.stop) for d in done), (count, count)]
    return [
        (start, min(start + chunk, free_stop))
        for (_, free_start), (free_stop, _) in itertools.pairwise(edges)
        for start in range(free_start, free_stop, chunk)
    ]


def _checked(
    values: Mapping[str, NDArray[Any]], start: int, stop: int, fields: Mapping[str, Field], title: str
) -> dict[str, NDArray[Any]]:
    """The chunk's arrays in C order, if they are what was announced."""
    if set(values) != set(fields):
        raise ValueError(f"{title}: computed {sorted(values)} in place of {sorted(fields)}")
    for name, field in fields.items():
        found, wanted = (values[name].shape, values[name].dtype), ((stop - start, *field.shape), np.dtype(field.dtype))
        if found != wanted:
            raise ValueError(f"{title}: {name} of items {start} to {stop - 1} is {found}, announced was {wanted}")
        if np.issubdtype(wanted[1], np.inexact):
            finite = np.isfinite(values[name]).reshape(stop - start, -1).all(axis=1)
            if not finite.all():
                raise CrispError(
                    f"{title}: {name} of item {start + int(finite.argmin())} is not finite, so the model has diverged "
                    f"or its precision overflows; give an earlier checkpoint, or --precision float32"
                )
    return {name: np.ascontiguousarray(values[name]) for name in fields}
