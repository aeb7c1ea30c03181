"""The CPU renderer: a crew of threads, each of which decodes a sample and renders all of its views."""

import logging
import math
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from crisp.batch import Batch
from crisp.config import ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.buffers import BufferPool
from crisp.pipelines.crew import Crew, Job
from crisp.pipelines.decode import Decoder
from crisp.pipelines.faults import SampleError, not_replaced
from crisp.pipelines.pixels import Scratch, render_sample
from crisp.pipelines.source import Work

log = logging.getLogger(__name__)

Replace = Callable[[Work, int, SampleError], None]
"""Puts another sample in place of one of `Work` that cannot be shown: `TrainSource.replace`"""

Check = Callable[[Work, int], None]
"""Looks at the bytes of a sample before they are decoded, or raises a SampleError: `TrainSource.check`"""


class _Worker(threading.local):
    """What each thread keeps."""

    def __init__(self, views: ViewsConfig) -> None:
        self.decoder = Decoder()
        self.scratch = Scratch(max(views.reference_px, *views.view_px), math.ceil(3 * views.blur_sigma_px[1]))


class CpuRenderer:
    """Renders plans on `threads` threads; the work is done without the interpreter lock.

    The tensors' memory is used again after the last reference to them is gone. The first batch of an installation
    also compiles the kernels, which takes some seconds; they are cached for later processes.

    Args:
        views: what to render; the plans must be drawn for it.
        threads: 1 or more.
        dtype: of the images, float32 or float16.
        replace: called when a sample cannot be decoded, when the code that renders it fails, and when its decoding
            takes longer than `timeout_s`; None: the fault is raised.
        check: called before a sample is decoded.
        timeout_s: for decoding one sample.
        pin_memory: images in page-locked memory, from which a GPU copies by itself.

    Raises:
        CrispError: no threads, or another type.
    """

    def __init__(
        self,
        views: ViewsConfig,
        *,
        threads: int,
        dtype: torch.dtype = torch.float32,
        replace: Replace | None = None,
        check: Check | None = None,
        timeout_s: float = 60.0,
        pin_memory: bool = False,
    ) -> None:
        if threads < 1:
            raise CrispError(f"threads={threads}: the CPU renderer needs 1 or more")
        if dtype not in (torch.float32, torch.float16):
            raise CrispError(f"dtype {dtype}: the CPU renderer writes float32 and float16; cast the batch")
        self._views, self._dtype, self._timeout_s = views, dtype, timeout_s
        self._replace, self._check = replace, check
        self._buffers = BufferPool(pin_memory=pin_memory)
        self._worker = _Worker(views)
        self._crew = Crew(threads, name="crisp-render")

    def begin(self, work: Work) -> "Rendering":
        """Have the threads render `work`; they do so in the order in which batches were begun."""
        return Rendering(self, work)

    def render(self, work: Work) -> Batch:
        """The batch of `work`, on the CPU. Several threads may call it at once: they share the crew.

        Raises:
            CrispError: see `Rendering.batch`.
        """
        return self.begin(work).batch()

    def close(self) -> None:
        """Stop the threads."""
        self._crew.close()

    def images(self, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Uninitialised reference, global and local views of a batch."""
        views, take = self._views, self._buffers.take
        return (
            take((samples, 3, views.reference_px, views.reference_px), self._dtype),
            take((2, samples, 3, views.global_px, views.global_px), self._dtype),
            take((views.local_views, samples, 3, views.local_px, views.local_px), self._dtype),
        )

    def submit(self, work: Work, b: int, words: list[np.ndarray]) -> Job:
        """Have sample `b` rendered into the batch's memory."""
        return self._crew.submit(lambda job: self._render_sample(work, b, words, job))

    def outcome(self, job: Job) -> SampleError | None:
        """What a job came to; waits for it."""
        if not self._crew.wait(job, timeout_s=self._timeout_s):
            return SampleError("timeout", f"not decoded within data.sample_timeout_s={self._timeout_s:g}")
        if job.error is None or isinstance(job.error, SampleError):
            return job.error
        log.error("the renderer failed at a sample", exc_info=job.error)
        return SampleError("render", f"the renderer failed ({job.error!r})")

    def replace(self, work: Work, b: int, fault: SampleError) -> None:
        """Put another sample into place `b`.

        Raises:
            CrispError: nothing to replace it by.
        """
        if self._replace is None:
            raise not_replaced(f"sample {work.plan.sample_id[b]}", fault) from fault
        self._replace(work, b, fault)

    def _render_sample(self, work: Work, b: int, images: list[np.ndarray], job: Job) -> None:
        plan, worker = work.plan, self._worker
        if self._check is not None:
            self._check(work, b)
        try:
            pixels, height, width = worker.decoder.decode_flat(work.encoded[b])
        except CrispError as error:
            raise SampleError("decode", str(error)) from error
        if not job.commit():
            return  # it took too long, and another sample is in this place
        reference, global_views, local_views = images
        rendered = render_sample(
            pixels,
            height,
            width,
            self._views.interpolation == "bicubic",
            plan.crop_px[b],
            plan.flip[b],
            plan.blur_sigma_px[b],
            plan.color_matrix[b],
            plan.solarize[b],
            b,
            reference,
            global_views,
            local_views,
            self._dtype == torch.float16,
            worker.scratch.columns(width),
            worker.scratch.fixed,
        )
        if not rendered:
            raise SampleError(
                "decode", f"a window of its plan leaves the image of {width}×{height} px: the index has another size"
            )


class Rendering:
    """A batch that is being rendered."""

    def __init__(self, renderer: CpuRenderer, work: Work) -> None:
        self._renderer, self._work = renderer, work
        self._images = renderer.images(len(work.encoded))
        self._words = [_words(images) for images in self._images]
        self._jobs = [renderer.submit(work, b, self._words) for b in range(len(work.encoded))]

    def batch(self) -> Batch:
        """Wait for it, on the CPU.

        Raises:
            CrispError: a sample that cannot be shown, where the renderer has no `replace` or that raises.
        """
        for b, job in enumerate(self._jobs):
            while (fault := self._renderer.outcome(job)) is not None:
                self._renderer.replace(self._work, b, fault)
                job = self._renderer.submit(self._work, b, self._words)
        reference, global_views, local_views = self._images
        plan = self._work.plan
        return Batch(
            reference=reference,
            global_views=global_views,
            local_views=local_views,
            view_from_reference=torch.from_numpy(plan.view_from_reference),
            patch_masks=torch.from_numpy(plan.patch_masks),
            region_seed=torch.from_numpy(plan.region_seed),
            label=torch.from_numpy(self._work.label),
            sample_id=torch.from_numpy(plan.sample_id),
        )


def _words(images: Tensor) -> np.ndarray:
    """The tensor's memory as the kernels take it: unsigned integers of its width."""
    return images.numpy().view(np.uint32 if images.dtype == torch.float32 else np.uint16)
