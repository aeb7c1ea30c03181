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

    Where the cache is too small for both, as many of the next ones as fit beside the current ones.

    Args:
        cache: of the shards.
        layout: of the order.
        slots: of the global batch, that the rank reads.
        threads: downloads at once.
    """

    def __init__(self, cache: ShardCache, layout: EpochLayout, slots: Ints, *, threads: int = 4) -> None:
        self._cache, self._layout, self._slots = cache, layout, slots
        self._coming: ComingShards | None = None
        self._wanted: deque[int] = deque()
        self._changed = threading.Condition()
        self._closed = self._warned = False
        self._threads = [threading.Thread(target=self._work, name="crisp-fetch", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def advance(self, step: int) -> None:
        """The rank stands at this global step now. Returns at once; costs about .1 ms."""
        coming = coming_shards(self._layout, step, self._slots)
        if coming == self._coming:
            return
        self._coming = coming
        for shard in coming.current:
            self._cache.touch(shard)  # what is being read goes last
        wanted = self._fitting(coming)
        with self._changed:  # what was wanted before, at another step, no longer counts
            self._wanted = deque(wanted)
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads; a download under way is not waited for."""
        with self._changed:
            self._closed = True
            self._wanted.clear()
            self._changed.notify_all()

    def _fitting(self, coming: ComingShards) -> list[int]:
        size = self._cache.shard_bytes
        left = self._cache.limit_bytes - sum(map(size, coming.current))
        if left < 0 and not self._warned:
            self._warned = True
            log.warning(
                "data.cache_gb=%g: the shards that a step reads from have %.3g GB, so that some will be fetched again "
                "and again; raise --data.cache-gb, or start a run with a smaller --data.shuffle-window-shards",
                self._cache.limit_bytes / 1e9, (self._cache.limit_bytes - left) / 1e9,
            )  # fmt: skip
        wanted = list(coming.current)
        for shard in coming.following:
            left -= size(shard)
            if left < 0:
                break
            wanted.append(shard)
        return wanted

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._wanted and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                shard = self._wanted.popleft()
            try:
                self._cache.fetch(shard)
            except (OSError, CrispError) as error:  # whoever reads a sample of it gets the error, too
                log.warning("prefetch: %s", error)
