"""The DALI renderer: steps in, batches out, in torch's hands. The graph itself is in `dali_graph`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from crisp.batch import Batch
from crisp.config import ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.dali_graph import DaliDevice, Pipeline, Source, build_graph
from crisp.pipelines.decode import Decoder


class DaliRenderer:
    """Renders a source's plans with DALI, `prefetch_batches` ahead of the step.

    What is copied. DALI's buffers are taken over as they are (DLPack): `reference` is the memory that DALI wrote. The
    views come out as a tensor each and are stacked into the view-major [2, B, …] and [L, B, …]: one copy on the device
    (74 MB for 64 images of 2 × 224² + 10 × 96² in float16). The encoded images are copied once, into memory shared
    with the process that reads them.

    Args:
        views: what to render; the source's plans must be drawn for it.
        source: the work of a global step: pure, and picklable where `workers` is not 0.
        batch_size: B, the same for every step.
        device: `gpu` decodes and renders on the GPU; `cpu` runs the same graph without one.
        device_id: of the GPU; None: torch's current one.
        threads: CPU threads of the graph.
        prefetch_batches: batches rendered ahead.
        workers: spawned processes that call the source, a step each; 0 calls it from `next`. Spawned processes import
            the main module, so a script that iterates needs its `if __name__ == "__main__"`.
        dtype: of the pixels: float32 or float16.

    Raises:
        CrispError: a GPU asked for where there is none; pixels of another type.
    """

    def __init__(
        self,
        views: ViewsConfig,
        *,
        source: Source,
        batch_size: int,
        device: DaliDevice,
        device_id: int | None,
        threads: int,
        prefetch_batches: int,
        workers: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.float16):
            raise CrispError(f"dtype {dtype}: DALI writes float32 and float16; take one of them and cast the batch")
        self._views = views
        self._source = source
        self._prefetch_batches = prefetch_batches
        self._device_id = _gpu(device_id) if device == "gpu" else None
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "device": device,
            "threads": threads,
            "workers": workers,
            "half": dtype == torch.float16,
        }
        self._graph: Pipeline | None = None
        self._runs = 0

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Batches of steps first_step, first_step + 1, … without end; an earlier iterator of this renderer ends.

        Raises:
            CrispError: the source's own, raised up to `prefetch_batches` − 1 steps early, or an image that cannot be
                decoded.
        """
        self.close()
        run = self._runs
        self._graph = build_graph(
            self._views,
            source=self._source,
            first_step=first_step,
            device_id=self._device_id,
            prefetch_batches=self._prefetch_batches,
            **self._options,
        )
        step = first_step
        try:
            while self._runs == run:
                yield self._next(step)
                step += 1
        finally:
            if self._runs == run:
                self.close()

    def close(self) -> None:
        """End the current iterator, its threads and its processes. Batches handed out stay valid."""
        self._runs += 1
        self._graph = None  # its only reference: DALI stops with it

    def _next(self, step: int) -> Batch:
        assert self._graph is not None
        # On torch's stream: what torch does with the outputs waits for them, the host does not.
        stream = None if self._device_id is None else torch.cuda.current_stream(self._device_id)
        try:
            outputs = self._graph.run(stream)
        except Exception as error:
            self._explain(step, error)
            raise
        tensors = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        return _as_batch(self._views, tensors)

    def _explain(self, step: int, error: Exception) -> None:
        """Raise what a failed run was about, if it can be found: DALI's message names neither step nor sample.

        An error of the source reaches this process as text. The source is pure: asked again, it raises its own.
        """
        decode = Decoder()
        for ahead in range(self._prefetch_batches):  # the steps in flight
            work = self._source(step + ahead)
            for sample_id, image in zip(work.plan.sample_id, work.encoded, strict=True):
                try:
                    decode(image)
                except CrispError as cause:
                    raise CrispError(
                        f"sample {sample_id} of step {step + ahead}: {cause}; shard the source again, 'crisp shard' "
                        f"leaves out what cannot be decoded"
                    ) from error


def _as_batch(views: ViewsConfig, outputs: list[Tensor]) -> Batch:
    reference, *rendered = outputs[: 1 + views.views]  # [B, 3, side, side] each
    view_from_reference, patch_masks, region_seed, label, sample_id = outputs[1 + views.views :]
    no_views = reference.new_empty((0, len(reference), 3, views.local_px, views.local_px))
    return Batch(
        reference=reference,
        global_views=torch.stack(rendered[:2]),
        local_views=torch.stack(rendered[2:]) if views.local_views else no_views,
        view_from_reference=view_from_reference.transpose(0, 1).contiguous(),  # [B, V, 2, 3] → [V, B, 2, 3]
        patch_masks=patch_masks.transpose(0, 1).contiguous(),  # [B, 2, n] → [2, B, n]
        region_seed=region_seed,
        label=label,
        sample_id=sample_id,
    )


def _gpu(device_id: int | None) -> int:
    """The GPU of that number, or the current one.

    Raises:
        CrispError: no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise CrispError("renderer dali on the GPU: torch sees no GPU; run with --device cpu, or check the driver")
    if device_id is None:
        return torch.cuda.current_device()
    if not 0 <= device_id < count:
        raise CrispError(f"renderer dali on GPU {device_id}: torch sees {count}; take one of 0 to {count - 1}")
    return device_id
