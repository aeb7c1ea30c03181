"""Batches on their way to a GPU: copied on a stream of their own, while the step runs on another."""

import dataclasses
from collections import deque
from typing import Any

import torch

from crisp.batch import Batch


class Sent:
    """A batch whose copy has been started."""

    def __init__(self, batch: Batch, copied: Any) -> None:
        self._batch, self._copied = batch, copied

    def receive(self) -> Batch:
        """The batch on the device: what the current stream does from now on waits for the copy, the host does not."""
        stream = torch.cuda.current_stream(self._batch.reference.device)
        stream.wait_event(self._copied)
        for field in dataclasses.fields(Batch):
            # Its memory was allocated on the copying stream; it must not be used again before this one is done with it.
            if (tensor := getattr(self._batch, field.name)).is_cuda:
                tensor.record_stream(stream)
        return self._batch


class Arrived:
    """A batch that needs no copy."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def receive(self) -> Batch:
        """The batch."""
        return self._batch


class DeviceTransfer:
    """Copies batches from page-locked memory to a device; to the CPU it hands them on.

    Two copies may be under way: a third waits for the first. The host's memory is let go when its copy is done.

    Args:
        device: where batches shall lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._under_way: deque[tuple[Any, Batch]] = deque()

    def send(self, batch: Batch) -> Sent | Arrived:
        """Start the copy of a batch in host memory."""
        if self._stream is None:
            return Arrived(batch)
        while len(self._under_way) >= 2:
            event, _ = self._under_way.popleft()
            event.synchronize()
        pinned = batch.pin_memory()  # itself where it is; the affines, masks and labels are small
        with torch.cuda.stream(self._stream):
            on_device = pinned.to(self._device, non_blocking=True)
            copied = self._stream.record_event()
        self._under_way.append((copied, pinned))
        return Sent(on_device, copied)
