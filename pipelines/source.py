"""What one rank renders at a global step: the encoded images and the plan, as a pure function of the step.

Pure but for faults: a sample that cannot be read is replaced by a neighbour, and the fault log makes that repeatable.
"""

import itertools
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from crisp.config import TrainConfig
from crisp.errors import CrispError
from crisp.pipelines.byte_pool import BytePool
from crisp.pipelines.crew import Crew, Job
from crisp.pipelines.decode import check_header
from crisp.pipelines.faults import FaultLog, Replacement, SampleError, neighbours
from crisp.pipelines.order import EpochLayout, coming_shards, epoch_and_step, global_batch_samples, rank_slots
from crisp.pipelines.plan import Plan, make_plan, put_sample
from crisp.pipelines.shards import ShardSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One rank's share of one step. B is the same for every step of a rank."""

    encoded: list[memoryview]
    """B encoded images"""
    plan: Plan
    label: NDArray[np.int64]
    """[B]"""
    step: int = 0
    """Global step"""
    asked_id: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """[B] samples as the order has them; the plan's `sample_id` has the neighbours of those that were replaced"""


class TrainSource:
    """Called with a global step, gives this rank's `Work`. It can be pickled to another process.

    Images are read by a crew of threads, since storage that is slow to answer may still answer many at once; a read
    that hangs is given up.

    Args:
        config: the run.
        shards: the data.
        faults: what is shown in place of samples that cannot be.
        rank: of `world_size` ranks on `nodes` machines.
        world_size: see `rank`.
        nodes: see `rank`.
        check_headers: compare each image's header with the index as well, for a renderer that bad bytes would kill.
        check_late: leave checksums to a renderer that calls `check`: its threads have the bytes in their cache anyway.

    Raises:
        CrispError: a batch larger than the data, or smaller than the world.
    """

    def __init__(
        self,
        config: TrainConfig,
        shards: ShardSet,
        faults: FaultLog,
        *,
        rank: int,
        world_size: int,
        nodes: int,
        check_headers: bool = False,
        check_late: bool = False,
    ) -> None:
        self.shards, self.faults = shards, faults
        self.layout = EpochLayout(
            shard_samples=[shard.samples for shard in shards.manifest.shards],
            global_batch=config.optim.global_batch,
            parts=config.data.parts,
            window_shards=config.data.shuffle_window_shards,
            seed=config.seed,
        )
        self.slots = rank_slots(config.optim.global_batch, rank=rank, world_size=world_size, nodes=nodes)
        """[B] of the global batch"""
        self._views, self._seed = config.views, config.seed
        self._threads, self._timeout_s = config.data.read_threads, config.data.sample_timeout_s
        self._check_headers, self._check_late = check_headers, check_late
        self._memory = BytePool()
        self._crew: Crew | None = None
        self._opened: frozenset[int] = frozenset()

    @property
    def batch_size(self) -> int:
        """B, this rank's images per step."""
        return len(self.slots)

    def __call__(self, step: int) -> Work:
        """The work of a global step, counted from 0 since the run began.

        Raises:
            CrispError: more samples cannot be read than the run allows.
        """
        self.faults.refresh()  # of other processes of this rank
        epoch, step_in_epoch = epoch_and_step(self.layout, step)
        if self.shards.cache is not None and self.shards.opened != self._opened:  # windows end now and then
            self.shards.close_others(coming_shards(self.layout, step, self.slots).current)
            self._opened = self.shards.opened
        asked_id = global_batch_samples(self.layout, epoch, step_in_epoch, self.slots)
        shown_id = np.array([self.faults.shown(epoch, int(i)) for i in asked_id], np.int64)
        reads = [_Reads(self, some) for some in np.array_split(shown_id, min(self._threads, len(shown_id)))]
        work = Work(
            encoded=[memoryview(b"")] * len(shown_id),
            plan=self._plan(epoch, shown_id),
            label=self._labels(shown_id),
            step=step,
            asked_id=asked_id,
        )
        for b, outcome in enumerate(itertools.chain.from_iterable(read.outcomes() for read in reads)):
            if isinstance(outcome, SampleError):
                self.replace(work, b, outcome)
            else:
                work.encoded[b] = outcome
        return work

    def replace(self, work: Work, b: int, fault: SampleError) -> None:
        """Put a neighbour in the place of sample `b` of `work`, in all of its arrays, and log it.

        Args:
            work: of this source.
            b: place in the batch.
            fault: of the sample that is there.

        Raises:
            CrispError: more bad samples than the run allows, or no neighbour can be read either.
        """
        epoch, _ = epoch_and_step(self.layout, work.step)
        failed_id, asked_id = int(work.plan.sample_id[b]), int(work.asked_id[b])
        shown_id, data = self._neighbour(asked_id, self.faults.failed(epoch, asked_id) | {failed_id}, fault)
        self.faults.add(
            Replacement(
                step=work.step,
                epoch=epoch,
                asked_id=asked_id,
                shown_id=shown_id,
                failed_id=failed_id,
                kind=fault.kind,
                shard=self.shards.manifest.shards[self.shards.shard_of(failed_id)].name,
                key=self.shards.key(failed_id),
                reason=fault.reason,
            )
        )
        self.faults.check()
        work.encoded[b] = data
        put_sample(work.plan, b, self._plan(epoch, np.array([shown_id])))
        work.label[b] = self._labels(np.array([shown_id]))[0]

    def _neighbour(self, asked_id: int, failed: frozenset[int], fault: SampleError) -> tuple[int, memoryview]:
        gone = self.shards.shard_of(asked_id) if fault.kind == "shard" else None
        for group in neighbours(self.layout.sizes, self.layout.first_rows, asked_id):
            for candidate in group:
                if candidate in failed:
                    continue
                if self.shards.shard_of(candidate) == gone:
                    break
                (outcome,) = _Reads(self, np.array([candidate])).outcomes()
                if self._check_late and not isinstance(outcome, SampleError):
                    try:
                        self.shards.check(candidate, outcome)
                    except SampleError:
                        continue
                if not isinstance(outcome, SampleError):
                    return candidate, outcome
                if outcome.kind == "shard":
                    break
        raise CrispError(
            f"sample {asked_id} cannot be shown, and none of its neighbours can: {fault}; the shards were at "
            f"{self.shards.folder}: mend them ('crisp shard verify') and resume"
        ) from fault

    def read(self, sample_id: int, into: memoryview) -> memoryview:
        """A sample's bytes; with `check_late`, without a look at their checksum.

        Raises:
            SampleError: it cannot be shown.
        """
        if (kind := self.faults.unusable(sample_id)) is not None:
            raise SampleError(kind, "failed before")
        data = self.shards.read(sample_id, into, check=not self._check_late)
        if self._check_headers:
            row = self.shards.index[sample_id]
            try:
                check_header(data, height_px=int(row["height"]), width_px=int(row["width"]))
            except CrispError as error:
                raise SampleError("decode", str(error)) from error
        return data

    def check(self, work: Work, b: int) -> None:
        """What `check_late` has left for the renderer.

        Raises:
            SampleError: the bytes of sample `b` are not those that were indexed.
        """
        self.shards.check(int(work.plan.sample_id[b]), work.encoded[b])

    def memory(self, sample_ids: NDArray[np.int64]) -> list[memoryview]:
        """For the bytes of some samples."""
        ends = np.cumsum(self.shards.lengths(sample_ids)).tolist()
        memory = self._memory.take(ends[-1])
        return [memory[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def crew(self) -> Crew:
        """The threads that read, started when they are first needed (and in each process of its own)."""
        if self._crew is None:
            self._crew = Crew(self._threads, name="crisp-read")
        return self._crew

    def close(self) -> None:
        """End the threads."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    @property
    def timeout_s(self) -> float:
        """Of a read."""
        return self._timeout_s

    def _plan(self, epoch: int, sample_id: NDArray[np.int64]) -> Plan:
        rows = self.shards.index[sample_id]
        return make_plan(
            self._views,
            seed=self._seed,
            epoch=epoch,
            sample_id=sample_id,
            height_px=rows["height"],
            width_px=rows["width"],
        )

    def _labels(self, sample_id: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.shards.index[sample_id]["label"].astype(np.int64)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_crew", "_memory")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._crew, self._memory = None, BytePool()


class _Reads:
    """Bytes of some samples, on their way: one thread reads one after the other."""

    def __init__(self, source: TrainSource, sample_ids: NDArray[np.int64]) -> None:
        self._source, self._rest = source, sample_ids
        self._start()

    def _start(self) -> None:
        # A list of this job's own: should it be given up, it may wake up later and find that nobody looks at it.
        self._outcomes: list[memoryview | SampleError] = []
        self._job = self._source.crew().submit(partial(self._call, self._rest, self._outcomes))

    def _call(self, sample_ids: NDArray[np.int64], outcomes: list[memoryview | SampleError], job: Job) -> None:
        for sample_id, memory in zip(sample_ids.tolist(), self._source.memory(sample_ids), strict=True):
            job.begin_again()
            try:
                outcomes.append(self._source.read(sample_id, memory))
            except SampleError as fault:
                outcomes.append(fault)

    def outcomes(self) -> list[memoryview | SampleError]:
        """Wait for all of them."""
        timeout_s = self._source.timeout_s
        outcomes: list[memoryview | SampleError] = []
        while len(self._rest):
            if self._source.crew().wait(self._job, timeout_s=timeout_s):
                if self._job.error is not None:
                    raise self._job.error
                return outcomes + self._outcomes
            done = list(self._outcomes)  # as it is now: the thread may wake up
            reason = f"no answer within data.sample_timeout_s={timeout_s:g} while reading"
            outcomes += [*done, SampleError("timeout", reason)]
            self._rest = self._rest[len(done) + 1 :]
            self._start()
        return outcomes
