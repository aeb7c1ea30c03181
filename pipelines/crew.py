"""Threads that take jobs. A job that hangs can be given up: its thread is left behind and another takes its place."""

import queue
import threading
import time
import weakref
from collections.abc import Callable


class Job:
    """A call that a thread of a `Crew` makes, or will make."""

    def __init__(self, call: "Callable[[Job], None]") -> None:
        self._call = call
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._began_s: float | None = None
        self.thread: threading.Thread | None = None
        """Who makes the call, once it has begun"""
        self._committed = self._given_up = False
        self.error: BaseException | None = None
        """What the call raised; of a job that is done"""

    def run(self) -> bool:
        """In the thread: make the call. False if the job was given up meanwhile."""
        self.thread, self._began_s = threading.current_thread(), time.monotonic()
        try:
            self._call(self)
        except BaseException as error:  # noqa: BLE001  whoever waits for the job raises or mends it
            self.error = error
        with self._lock:
            self._committed = True
        self._done.set()
        return not self._given_up

    def begin_again(self) -> None:
        """In the call, where it goes on to something else: `running_s` counts from here."""
        self._began_s = time.monotonic()

    def commit(self) -> bool:
        """In the call, before it writes what others see: from here on it cannot be given up. False if it was."""
        with self._lock:
            self._committed = not self._given_up
            return self._committed

    def give_up(self) -> bool:
        """False if it is too late: the job has committed, or is done."""
        with self._lock:
            self._given_up = not self._committed
            return self._given_up

    def wait(self, timeout_s: float) -> bool:
        """Whether it is done, after at most that long."""
        return self._done.wait(timeout_s)

    def running_s(self) -> float:
        """Seconds since it began; 0 while it is queued."""
        return 0.0 if self._began_s is None else time.monotonic() - self._began_s


class Crew:
    """Daemon threads that take jobs in the order in which they are submitted.

    Whatever a call raises, its thread lives on and takes the next job.

    Args:
        threads: 1 or more.
        name: of the threads.
    """

    def __init__(self, threads: int, *, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads: set[threading.Thread | None] = set()
        for _ in range(threads):
            self._hire()
        # The threads hold the queue and not the crew, so that a crew that nobody closed ends with its last reference.
        weakref.finalize(self, _dismiss, self._jobs, self._closed, threads).atexit = False

    def _hire(self) -> None:
        thread = threading.Thread(target=_work, args=(self._jobs, self._closed), name=self._name, daemon=True)
        thread.start()
        self._threads.add(thread)

    def submit(self, call: Callable[[Job], None]) -> Job:
        """Have a thread make `call(job)`."""
        job = Job(call)
        self._jobs.put(job)
        return job

    def wait(self, job: Job, *, timeout_s: float) -> bool:
        """Wait for a job. False if it ran longer than `timeout_s` and was given up; another thread was started then."""
        while not job.wait(min(timeout_s, 1.0)):
            if job.running_s() > timeout_s and self.give_up(job):
                return False
        return True

    def give_up(self, job: Job) -> bool:
        """Leave a job's thread behind and start another; False if it is too late for that."""
        if not job.give_up():
            return False
        self._threads.discard(job.thread)
        self._hire()
        return True

    def close(self) -> None:
        """End the threads; jobs that have not begun are dropped. Threads that hang are not waited for."""
        _dismiss(self._jobs, self._closed, len(self._threads))
        for thread in self._threads:
            assert thread is not None
            thread.join(timeout=5)
        self._threads.clear()


def _work(jobs: "queue.SimpleQueue[Job | None]", closed: threading.Event) -> None:
    while (job := jobs.get()) is not None and not closed.is_set():
        if not job.run():
            return  # its place was taken
        del job  # what the call holds is not kept until the next one


def _dismiss(jobs: "queue.SimpleQueue[Job | None]", closed: threading.Event, threads: int) -> None:
    closed.set()
    for _ in range(threads):
        jobs.put(None)
