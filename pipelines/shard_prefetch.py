"""Remote shards brought before they are read."""

import logging
import threading
from collections import deque

from crisp.errors import CrispError
from crisp.pipelines.order import ComingShards, EpochLayout, Ints, coming_shards
from crisp.pipelines.shard_cache import ShardCache

log = logging.getLogger(__name__)


class ShardPrefetcher:
    """Daemon threads that bring the shards of the windows that a rank reads from, then those of the next windows.

    Where the rank's share of the cache is too small for both, as many of the next ones as fit beside the current ones.
    A shard that straddles two parts is read at the beginning of one and at the end of the other, so it is downloaded
    twice where the cache is smaller than the data.

    Args:
        cache: of the shards.
        layout: of the order.
        slots: of the global batch, that the rank reads.
        threads: downloads at once.
        ranks: of this machine, which share the cache evenly; else they would remove what another one needs sooner.
    """

    def __init__(
        self, cache: ShardCache, layout: EpochLayout, slots: Ints, *, threads: int = 4, ranks: int = 1
    ) -> None:
        self._cache, self._layout, self._slots, self._ranks = cache, layout, slots, ranks
        self._step, self._planned = 0, True
        self._coming: ComingShards | None = None
        self._wanted: deque[int] = deque()
        self._under_way: set[int] = set()
        self._changed = threading.Condition()
        self._planning = threading.Lock()
        self._closed = self._warned = False
        self._reported: set[str] = set()
        self._threads = [threading.Thread(target=self._work, name="crisp-fetch", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def advance(self, step: int) -> None:
        """The rank stands at this global step now. Returns at once: a thread that is free plans for it."""
        with self._changed:
            self._step, self._planned = step, False
            self._changed.notify()

    def close(self) -> None:
        """End the threads; a download under way is not waited for."""
        with self._changed:
            self._closed = True
            self._wanted.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            shard: int | None = None
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._planned or self._wanted)
                if self._closed:
                    return
                step, planned, self._planned = self._step, self._planned, True
                if planned:
                    shard = self._wanted.popleft()
                    self._under_way.add(shard)
            try:
                if shard is None:
                    self._plan(step)
                else:
                    self._bring(shard)
            except (OSError, CrispError) as error:  # whoever reads a sample of it gets the error, too
                if str(error) not in self._reported:
                    self._reported.add(str(error))
                    log.warning("prefetch: %s", error)

    def _bring(self, shard: int) -> None:
        try:
            self._cache.fetch(shard)
        finally:
            with self._changed:
                self._under_way.discard(shard)

    def _plan(self, step: int) -> None:
        with self._planning:
            if step != self._step:  # another thread plans for where the rank is by now
                return
            coming = coming_shards(self._layout, step, self._slots)
            if coming == self._coming:
                return
            self._coming = coming
            # All that are there already are counted as used before any is brought, which could push them out; those
            # needed first last, so that they go last.
            wanted = [shard for shard in reversed(self._fitting(coming)) if not self._cache.touch(shard)]
            with self._changed:  # what was wanted before, at another step, no longer counts
                self._wanted = deque(shard for shard in reversed(wanted) if shard not in self._under_way)
                self._changed.notify_all()

    def _fitting(self, coming: ComingShards) -> list[int]:
        size, share_bytes = self._cache.shard_bytes, self._cache.limit_bytes // self._ranks
        left = share_bytes - sum(map(size, coming.current))
        if left < 0 and not self._warned:
            self._warned = True
            log.warning(
                "data.cache_gb=%g: the shards that a step of this machine's %d ranks reads from have about %.3g GB, so "
                "that some will be fetched again and again; raise --data.cache-gb, or start a run with a smaller "
                "--data.shuffle-window-shards",
                self._cache.limit_bytes / 1e9, self._ranks, (share_bytes - left) * self._ranks / 1e9,
            )  # fmt: skip
        wanted = list(coming.current)
        for shard in coming.following:
            left -= size(shard)
            if left < 0:
                break
            wanted.append(shard)
        return wanted
