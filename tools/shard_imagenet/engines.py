"""Who makes the shards: processes of this machine, or tasks on a Ray cluster. Both call `work.make_shard`."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any

from crisp.errors import CrispError
from crisp.shard_imagenet.reading import SourceReader
from crisp.shard_imagenet.work import Job, ShardDone, ShardTask, make_shard

OnDone = Callable[[ShardDone], None]
OnFiles = Callable[[int], None]

_LOOK_EVERY_S = 0.2
_CONNECT_S = 10
_TELL_EVERY = 16  # files between two updates of the shared counter


def run_local(
    job: Job, tasks: Iterable[ShardTask], *, shards: int, workers: int, on_done: OnDone, on_files: OnFiles
) -> None:
    """Make shards in up to `workers` processes, or with threads in this one if one process would be all.

    Args:
        job: what is the same for all shards.
        tasks: taken as they are needed.
        shards: number of tasks.
        workers: processes, and where there are fewer shards, threads within them; 0: the usable cores.
        on_done: called for each finished shard.
        on_files: called now and then with the number of files done so far.

    Raises:
        CrispError: as `make_shard`, or a process that died.
        OSError: a failure to write.
    """
    workers = workers or len(os.sched_getaffinity(0))
    processes = min(workers, shards)
    threads = max(1, workers // max(1, processes))
    if processes <= 1:
        _run_here(job, tasks, threads, on_done, on_files)
        return
    # Workers are forked from a process that has imported everything once, and has no threads that could hold a lock.
    context = multiprocessing.get_context("forkserver")
    preload = ["crisp.shard_imagenet.engines"]
    if job.cfg.short_side is not None:
        preload.append("crisp.shard_imagenet.resize_ready")
    context.set_forkserver_preload(preload)
    files, stop = context.Value(ctypes.c_uint64), context.RawValue(ctypes.c_bool)
    pool = ProcessPoolExecutor(processes, context, _start_worker, (job, threads, files, stop))
    tasks = iter(tasks)
    try:
        pending: set[Future[ShardDone]] = {pool.submit(_work, task) for task in islice(tasks, processes + 2)}
        while pending:
            done, pending = wait(pending, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
            for future in done:
                on_done(future.result())
            pending |= {pool.submit(_work, task) for task in islice(tasks, len(done))}
            on_files(files.value)
    except BrokenProcessPool as error:
        raise CrispError(
            "a worker process died (killed from outside, perhaps for want of memory); start again, finished shards "
            "are kept; --workers lowers the memory needed"
        ) from error
    finally:
        stop.value = True
        pool.shutdown(cancel_futures=True)


def _run_here(job: Job, tasks: Iterable[ShardTask], threads: int, on_done: OnDone, on_files: OnFiles) -> None:
    files = 0

    def count() -> None:
        nonlocal files
        files += 1
        on_files(files)

    with contextlib.closing(SourceReader(job.containers)) as reader:
        for task in tasks:
            on_done(make_shard(job, task, reader, threads=threads, on_file=count))


# --- in a worker process --------------------------------------------------------------------------------------------


class _StopError(Exception):
    """The main process has given up."""


class _Worker:
    """What a worker process keeps from shard to shard."""

    def __init__(self, job: Job, threads: int, files: Any, stop: Any) -> None:
        self.job, self.threads, self.files, self.stop = job, threads, files, stop
        self.reader = SourceReader(job.containers)
        self.untold = 0

    def count(self) -> None:
        self.untold += 1
        if self.untold == _TELL_EVERY:
            self.tell()
        if self.stop.value:
            raise _StopError

    def tell(self) -> None:
        with self.files.get_lock():
            self.files.value += self.untold
        self.untold = 0


_worker: _Worker


def _start_worker(job: Job, threads: int, files: Any, stop: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process gets it too, and stops the workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = _Worker(job, threads, files, stop)


def _die_with_parent() -> None:
    """A killed main process must leave nobody who still writes: the next one may begin at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"
    wait_for([parent.sentinel])
    os._exit(1)


def _work(task: ShardTask) -> ShardDone:
    done = make_shard(_worker.job, task, _worker.reader, threads=_worker.threads, on_file=_worker.count)
    _worker.tell()
    return done


# --- Ray ------------------------------------------------------------------------------------------------------------


def run_ray(
    job: Job, tasks: Iterable[ShardTask], *, workers: int, address: str, on_done: OnDone, on_files: OnFiles
) -> None:
    """Make shards as tasks on an existing Ray cluster, each on one core of any node.

    Source and output must be readable and writable from every node (a store, or a shared file system), and crisp
    installed there.

    Args:
        job: what is the same for all shards.
        tasks: taken as they are needed.
        workers: tasks at a time; 0: the cluster's cores.
        address: of the cluster; 'auto': the one that this machine belongs to.
        on_done: called for each finished shard.
        on_files: called with the number of files done, shard by shard.

    Raises:
        CrispError: Ray is not installed, no cluster, a node or a task that died again and again; as `make_shard`.
        OSError: a failure to write.
    """
    with _cluster(address) as ray:
        make = ray.remote(num_cpus=1)(_make_alone)
        shared_job = ray.put(job)
        at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        tasks, files = iter(tasks), 0
        pending = {make.remote(shared_job, task): len(task.entries) for task in islice(tasks, at_once)}
        try:
            while pending:
                (ready, *_), _ = ray.wait(list(pending), num_returns=1)
                on_done(ray.get(ready))
                files += pending.pop(ready)
                on_files(files)
                pending |= {make.remote(shared_job, task): len(task.entries) for task in islice(tasks, 1)}
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CrispError | OSError):
                raise error.cause from error
            raise
        except ray.exceptions.RayError as error:
            raise CrispError(f"Ray: {_first_line(error)}; start again, finished shards are kept") from error
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)


def _make_alone(job: Job, task: ShardTask) -> ShardDone:
    with contextlib.closing(SourceReader(job.containers)) as reader:
        return make_shard(job, task, reader, on_file=lambda: None)


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected; left connected if it was."""
    try:
        import ray
    except ImportError as error:
        raise CrispError("engine=ray: needs Ray; install 'crisp-ssl[cluster]'") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        host, _, port = address.rpartition(":")
        if port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host.rpartition("/")[2], int(port)), timeout=_CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise CrispError(
            f"ray_address={address!r}: no Ray cluster there ({_first_line(error)}); start one with 'ray start --head', "
            f"or leave --engine out"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
