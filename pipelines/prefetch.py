"""The CPU renderer, run ahead of the step by a thread that also sends batches to the device."""

import queue
import threading
from collections import deque
from collections.abc import Iterator

import torch

from crisp.batch import Batch
from crisp.pipelines.cpu import CpuRenderer, Rendering
from crisp.pipelines.source import TrainSource
from crisp.pipelines.transfer import Arrived, DeviceTransfer, Sent

_Ready = Sent | Arrived | BaseException


class PrefetchedCpuRenderer:
    """Renders the steps of a source up to `depth` batches ahead.

    The next batch is begun before the last samples of one are done, so that no thread of the renderer waits at the
    end of a batch. Up to `depth` + 3 batches are alive at once: those waiting, two being rendered, the one being used.
    """

    def __init__(self, renderer: CpuRenderer, source: TrainSource, *, depth: int, device: torch.device) -> None:
        self._renderer, self._source, self._depth = renderer, source, depth
        self._transfer = DeviceTransfer(device)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def batches(self, first_step: int) -> Iterator[Batch]:
        """See `BatchStream`."""
        self._halt()
        self._stop = stop = threading.Event()
        ready: queue.Queue[_Ready] = queue.Queue(self._depth)
        self._thread = threading.Thread(
            target=self._work, args=(first_step, ready, stop), name="crisp-prefetch", daemon=True
        )
        self._thread.start()
        while not stop.is_set():  # another iterator was asked for, or the renderer was closed
            try:
                item = ready.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            batch = item.receive()
            del item  # or it would keep the batch alive until the next one is there
            yield batch
            del batch

    def _work(self, step: int, ready: "queue.Queue[_Ready]", stop: threading.Event) -> None:
        under_way: deque[Rendering | BaseException] = deque()
        while not stop.is_set():
            if not under_way or (len(under_way) < 2 and not isinstance(under_way[-1], BaseException)):
                under_way.append(self._begin(step))
                step += 1
                continue
            item = self._finish(under_way.popleft())
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            del item

    def _begin(self, step: int) -> Rendering | BaseException:
        try:
            return self._renderer.begin(self._source(step))
        except BaseException as error:  # noqa: BLE001  handed to the consumer, which raises it
            return error

    def _finish(self, rendering: Rendering | BaseException) -> _Ready:
        if isinstance(rendering, BaseException):
            return rendering
        try:
            return self._transfer.send(rendering.batch())
        except BaseException as error:  # noqa: BLE001  handed to the consumer, which raises it
            return error

    def _halt(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """See `BatchStream`."""
        self._halt()
        self._source.close()
        self._renderer.close()
