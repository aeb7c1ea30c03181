"""The DALI renderer: steps in, batches out, in torch's hands. The graph itself is in `dali_graph`."""

import logging
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from crisp.batch import Batch
from crisp.config import DaliConfig, ViewsConfig
from crisp.errors import CrispError
from crisp.pipelines.cpu import Replace
from crisp.pipelines.crew import Crew, Job
from crisp.pipelines.dali_graph import (
    DaliDevice,
    DecoderOptions,
    Pipeline,
    Source,
    build_graph,
    check_drawn_for,
    decodes,
)
from crisp.pipelines.decode import Decoder
from crisp.pipelines.faults import SampleError, not_replaced
from crisp.pipelines.source import Work

log = logging.getLogger(__name__)

_Decode = Callable[[memoryview], str | None]
"""Decodes an image; says what was wrong with it, or None"""

_REBUILDS = 3  # of the same step without a sample that is to blame, before giving up


class DaliRenderer:
    """Renders a source's plans with DALI, `prefetch_batches` ahead of the step.

    What is copied. DALI's buffers are taken over as they are (DLPack): `reference` is the memory that DALI wrote. The
    views come out as a tensor each and are stacked into the view-major [2, B, …] and [L, B, …]: one copy on the device
    (74 MB for 64 images of 2 × 224² + 10 × 96² in float16). The encoded images are copied once, into memory shared
    with the process that reads them.

    A graph dies of an image that it cannot decode, with all that it had in flight. It is then looked for, among the
    steps in flight: by decoding on the CPU, then by DALI, one at a time. `replace` puts another sample in its place,
    and a new graph begins at the step that the consumer waits for. The same happens when a run takes longer than three
    times `timeout_s` (the processes that read have time-outs of their own) and when one of those processes dies.

    Args:
        views: what to render; the source's plans must be drawn for it.
        source: the work of a global step: picklable where `options.workers` is not 0, and pure but for what `replace`
            does.
        replace: called for a sample that the graph died of; None: it is an error.
        batch_size: B, the same for every step.
        device: `gpu` decodes and renders on the GPU; `cpu` runs the same graph without one.
        device_id: of the GPU; None: torch's current one.
        threads: CPU threads of the graph.
        prefetch_batches: batches rendered ahead.
        options: spawned processes that call the source, a step each, and the decoder's settings. Spawned processes
            import the main module, so a script that iterates needs its `if __name__ == "__main__"`.
        largest_px: width and height for which decoders reserve memory, where `options` leaves that to the data.
        timeout_s: see above.
        dtype: of the pixels: float32 or float16.

    Raises:
        CrispError: a GPU asked for where there is none; pixels of another type.
    """

    def __init__(
        self,
        views: ViewsConfig,
        *,
        source: Source,
        replace: Replace | None = None,
        batch_size: int,
        device: DaliDevice,
        device_id: int | None,
        threads: int,
        prefetch_batches: int,
        options: DaliConfig = DaliConfig(),  # noqa: B008  frozen
        largest_px: tuple[int, int] = (0, 0),
        timeout_s: float = 60.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.float16):
            raise CrispError(f"dtype {dtype}: DALI writes float32 and float16; take one of them and cast the batch")
        self._views, self._source, self._replace = views, source, replace
        self._device: DaliDevice = device
        self._device_id = _gpu(device_id) if device == "gpu" else None
        self._in_flight = prefetch_batches + options.workers
        self._timeout_s = timeout_s
        asked_px = options.preallocate_width_px, options.preallocate_height_px
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "device": device,
            "device_id": self._device_id,
            "threads": threads,
            "prefetch_batches": prefetch_batches,
            "workers": options.workers,
            "half": dtype == torch.float16,
            "decoder": DecoderOptions(
                hardware_share=options.hardware_decoder_share,
                preallocate_px=(asked_px[0] or largest_px[0], asked_px[1] or largest_px[1]),
            ),
        }
        self._graph: Pipeline | None = None
        self._crew = Crew(1, name="crisp-dali")
        self._workers: set[multiprocessing.process.BaseProcess] = set()
        self._runs = 0

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Batches of steps first_step, first_step + 1, … without end; an earlier iterator of this renderer ends.

        Raises:
            CrispError: the source's own, raised up to `prefetch_batches` − 1 steps early; an image that cannot be
                decoded and may not be replaced; a graph that dies again and again.
        """
        self.close()
        run = self._runs
        self._graph = self._build(first_step)
        step, deaths = first_step, 0
        try:
            while self._runs == run:
                batch = self._next()
                if isinstance(batch, Batch):
                    yield batch
                    step, deaths = step + 1, 0
                    continue
                self._graph = None
                deaths = 0 if self._blame(step, batch) else deaths + 1
                if deaths >= _REBUILDS:
                    raise CrispError(
                        f"step {step}: DALI failed {deaths} times, at no image in particular ({_last_line(batch)}); "
                        f"--data.renderer cpu does without it"
                    ) from batch
                log.warning("step %d: DALI failed (%s); its graph is built again", step, _last_line(batch))
                self._graph = self._build(step)
        finally:
            if self._runs == run:
                self.close()

    def close(self) -> None:
        """End the current iterator, its threads and its processes. Batches handed out stay valid."""
        self._runs += 1
        self._graph = None  # its only reference: DALI stops with it

    def _build(self, first_step: int) -> Pipeline:
        self._workers = set()
        return build_graph(self._views, source=self._source, first_step=first_step, **self._options)

    def _next(self) -> Batch | BaseException:
        """The graph's next batch, or what it died of."""
        graph = self._graph
        assert graph is not None
        # On torch's stream: what torch does with the outputs waits for them, the host does not.
        stream = None if self._device_id is None else torch.cuda.current_stream(self._device_id)
        outputs: list[Any] = []
        before = set(multiprocessing.active_children())
        job = self._crew.submit(lambda job: outputs.extend(graph.run(stream)))
        while not job.wait(1.0):
            if (dead := [worker for worker in self._workers if not worker.is_alive()]) and self._crew.give_up(job):
                return ChildProcessError(f"a process that reads ahead ended ({dead[0].exitcode})")
            if job.running_s() > 3 * self._timeout_s and self._crew.give_up(job):
                return TimeoutError(f"no batch within three times data.sample_timeout_s={self._timeout_s:g}")
        self._workers |= set(multiprocessing.active_children()) - before  # they start with the first run
        if job.error is not None:
            return job.error
        return _as_batch(self._views, [torch.from_dlpack(output.as_tensor()) for output in outputs])

    def _blame(self, step: int, error: BaseException) -> bool:
        """Have the samples replaced that the graph died of; False if there are none.

        DALI's message names neither step nor sample. An error of the source reaches this process as text: asked again,
        the source raises its own.
        """
        decode = Decoder()

        def on_the_cpu(image: memoryview) -> str | None:
            try:
                decode(image)
            except CrispError as cause:
                return str(cause)
            return None

        def by_dali(image: memoryview) -> str | None:
            return decodes(image, device=self._device, device_id=self._device_id)

        works, found = [], 0
        for ahead in range(self._in_flight):  # one at a time: a later step may have its own trouble
            works.append(self._source(step + ahead))
            check_drawn_for(self._views, works[-1])
            found += self._replace_what_fails(on_the_cpu, works[-1], step + ahead, error)
        if not found:
            found = sum(self._replace_what_fails(by_dali, work, step + i, error) for i, work in enumerate(works))
        return found > 0

    def _replace_what_fails(self, decode: _Decode, work: Work, step: int, error: BaseException) -> int:
        """Have the samples of a step replaced at which `decode` fails; how many there were."""
        found = 0
        for b in range(len(work.encoded)):
            while (fault := self._try(decode, work.encoded[b])) is not None:
                if self._replace is None:
                    raise not_replaced(f"sample {work.plan.sample_id[b]} of step {step}", fault) from error
                self._replace(work, b, fault)
                found += 1
        return found

    def _try(self, decode: _Decode, image: memoryview) -> SampleError | None:
        messages: list[str | None] = []
        job: Job = self._crew.submit(lambda job: messages.append(decode(image)))
        if not self._crew.wait(job, timeout_s=self._timeout_s):
            return SampleError("timeout", f"not decoded within data.sample_timeout_s={self._timeout_s:g}")
        if job.error is not None:
            raise job.error
        return None if messages[0] is None else SampleError("decode", messages[0])


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _as_batch(views: ViewsConfig, outputs: list[Tensor]) -> Batch:
    reference, *rendered = outputs[: 1 + views.views]  # [B, 3, side, side] each
    patch_masks, view_from_reference, region_seed, label, sample_id = outputs[1 + views.views :]
    patch_masks = patch_masks.transpose(0, 1).contiguous()  # [B, 2, n] → [2, B, n]
    no_views = reference.new_empty((0, len(reference), 3, views.local_px, views.local_px))
    return Batch(
        reference=reference,
        global_views=torch.stack(rendered[:2]),
        local_views=torch.stack(rendered[2:]) if views.local_views else no_views,
        view_from_reference=view_from_reference.transpose(0, 1).contiguous(),  # [B, V, 2, 3] → [V, B, 2, 3]
        patch_masks=patch_masks.pin_memory() if reference.is_cuda else patch_masks,
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
