"""The CPU renderer: a pool of threads, each of which decodes a sample and renders all of its views."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from crisp.batch import Batch
from crisp.config import ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.buffers import BufferPool
from crisp.pipelines.decode import Decoder
from crisp.pipelines.pixels import Scratch, render_sample
from crisp.pipelines.source import Work


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
        threads: of the pool, 1 or more.
        dtype: of the images, float32 or float16.

    Raises:
        CrispError: no threads, or another type.
    """

    def __init__(self, views: ViewsConfig, *, threads: int, dtype: torch.dtype = torch.float32) -> None:
        if threads < 1:
            raise CrispError(f"threads={threads}: the CPU renderer needs 1 or more")
        if dtype not in (torch.float32, torch.float16):
            raise CrispError(f"dtype {dtype}: the CPU renderer writes float32 and float16; cast the batch")
        self._views, self._dtype = views, dtype
        self._buffers = BufferPool()
        self._worker = _Worker(views)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="crisp-render")

    def render(self, work: Work) -> Batch:
        """The batch of `work`, on the CPU. Several threads may call it at once: they share the pool.

        Raises:
            CrispError: an image that cannot be decoded, or is smaller than a window of its plan.
        """
        views, plan = self._views, work.plan
        samples = len(work.encoded)
        reference = self._take(samples, 3, views.reference_px)
        global_views = self._take(2, samples, 3, views.global_px)
        local_views = self._take(views.local_views, samples, 3, views.local_px)
        images = [_words(images) for images in (reference, global_views, local_views)]
        tasks = [self._pool.submit(self._render_sample, work, b, images) for b in range(samples)]
        try:
            for task in tasks:
                task.result()
        finally:
            for task in tasks:  # after an error
                task.cancel()
        return Batch(
            reference=reference,
            global_views=global_views,
            local_views=local_views,
            view_from_reference=torch.from_numpy(plan.view_from_reference),
            patch_masks=torch.from_numpy(plan.patch_masks),
            region_seed=torch.from_numpy(plan.region_seed),
            label=torch.from_numpy(work.label),
            sample_id=torch.from_numpy(plan.sample_id),
        )

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _take(self, *shape: int) -> Tensor:
        return self._buffers.take((*shape, shape[-1]), self._dtype)

    def _render_sample(self, work: Work, b: int, images: list[np.ndarray]) -> None:
        plan, worker = work.plan, self._worker
        try:
            pixels, height, width = worker.decoder.decode_flat(work.encoded[b])
        except CrispError as error:
            raise CrispError(
                f"sample {plan.sample_id[b]}: {error}; shard the source again, which lists such images as rejected"
            ) from error
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
            raise CrispError(
                f"sample {plan.sample_id[b]}: a window of its plan leaves the image of {width}×{height} px; "
                f"the index has another size: shard the source again"
            )


def _words(images: Tensor) -> np.ndarray:
    """The tensor's memory as the kernels take it: unsigned integers of its width."""
    return images.numpy().view(np.uint32 if images.dtype == torch.float32 else np.uint16)
