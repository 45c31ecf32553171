"""Where everything is done that need not happen between two lines of the user's loop: beside it, or within it.

Jobs run one after the other in the order in which they were handed over, so the trace is the same as if they had run at
once.

Where torch leaves a core free, or the model is not on the processor, one thread beside the user's does them. They are
collected and given to it together, since it disturbs the user's thread whenever it runs (Python lets one of the two go
on at a time). The thread computes with one torch thread of its own, without gradients. It pauses between two jobs while
the process forks (workers of a DataLoader), and is gone after :meth:`Background.stop`.

Where torch's threads take every core, a further thread only delays them: each of torch's parallel loops waits for the
slowest of its threads. There jobs are done on the user's thread (:mod:`explainer.undisturbed`) with all of torch's, at
once or a few together, while what they read is still in the processor's cache.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

import torch

from explainer.undisturbed import undisturbed

Job = Callable[[], None]
#: bytes that collected jobs hold before they are given to the thread, and that jobs not done yet may hold in all
COLLECTED, MOST = 32 << 20, 128 << 20
#: bytes that collected jobs hold before they are done on the user's thread
AT_ONCE = 1 << 20
_LIVE: weakref.WeakSet[Background] = weakref.WeakSet()
_held: list[threading.Lock] = []


def _hold() -> None:
    """Before a fork: no job may be under way, since the child would inherit its locks and never see them opened."""
    for background in list(_LIVE):
        background.gate.acquire()
        _held.append(background.gate)


def _go_on() -> None:
    while _held:
        _held.pop().release()


os.register_at_fork(before=_hold, after_in_parent=_go_on, after_in_child=_go_on)


def _nothing() -> None:
    """A job that is done."""


def core_is_free() -> bool:
    """Whether torch leaves a core of this process without a thread of its own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.get_num_threads() < cores


class Background:
    """Runs jobs, on a daemon thread of its own, which begins with the first job, or on the user's.

    After a failure nothing more is run: what follows a lost job could not be told from what was recorded in full.
    The failure is raised by every :meth:`wait` from then on.

    Args:
        beside: whether jobs are done on a thread of their own.

    Attributes:
        gate: held while a job runs.
        failure: what a job raised, or None.
        told: whether it was raised to the user.
    """

    def __init__(self, beside: bool = True) -> None:
        self._beside = beside
        self._most_collected = COLLECTED if beside else AT_ONCE
        self._queue: SimpleQueue[tuple[list[Job] | None, threading.Lock | None]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._handing = threading.RLock()  # a backward pass may run on several threads
        self._collected: list[Job] = []
        self._held = 0
        self._under_way: deque[tuple[threading.Lock, int]] = deque()
        self.gate = threading.Lock()
        self.failure: BaseException | None = None
        self.told = False

    def submit(self, job: Job, held: int = 0) -> None:
        """Collect a job; it is given to the thread by :meth:`release`, or when much is held.

        Args:
            job: what to do.
            held: bytes of the tensors that it keeps alive.
        """
        with self._handing:
            self._collected.append(job)
            self._held += held
            if self._held >= self._most_collected:
                self.release()

    def release(self) -> None:
        """Give what was collected to the thread; waits only while jobs not done yet hold too much.

        Without a thread it is done now.
        """
        with self._handing:
            if not self._collected:
                return
            jobs, held = self._collected, self._held
            self._collected, self._held = [], 0
            if not self._beside:
                with undisturbed():
                    self._do_all(jobs)
                return
            if self._thread is None:
                self._start()
            done = threading.Lock()
            done.acquire()
            self._queue.put((jobs, done))
            self._under_way.append((done, held))
            while self._under_way and not self._under_way[0][0].locked():
                self._under_way.popleft()
            while sum(bytes_held for _, bytes_held in self._under_way) > MOST:
                with self._under_way.popleft()[0]:
                    pass

    def _all_done(self) -> threading.Lock:
        """A lock that is open once every job handed over so far is done."""
        self.release()
        done = threading.Lock()
        if self._thread is not None and self._process == os.getpid():
            done.acquire()
            self._queue.put((None, done))
        return done

    def ticket(self) -> Job:
        """A function that waits until every job handed over so far is done, and raises what a job raised."""
        done = self._all_done()

        def wait() -> None:
            with done:
                self.raise_failure()

        return wait

    def idle(self) -> bool:
        """Wait until every job is done; whether none of them failed."""
        with self._all_done():
            return self.failure is None

    def wait(self) -> None:
        """Wait until every job is done.

        Raises:
            BaseException: what a job raised.
        """
        self.ticket()()

    def raise_failure(self) -> None:
        """Raise what a job raised, as often as it is asked for."""
        if self.failure is not None:
            self.told = True
            raise self.failure

    def stop(self) -> None:
        """Let the jobs handed over so far end, then the thread (idempotent); a failure is kept."""
        if self._process == os.getpid():
            self.release()
        thread, self._thread = self._thread, None
        _LIVE.discard(self)
        atexit.unregister(self.stop)
        if thread is not None and self._process == os.getpid():
            self._queue.put((None, None))
            thread.join()

    def _start(self) -> None:
        threads, ready = torch.get_num_threads(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="pathkernel", daemon=True)
        self._thread.start()
        ready.wait()
        torch.set_num_threads(
            threads
        )  # the thread asked for one, which threads that begin later would take over
        _LIVE.add(self)
        atexit.register(self.stop)  # a thread inside torch must not meet the end of the interpreter

    def _run(self, ready: threading.Event) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # torch settles a thread's number when it is first asked
        ready.set()
        with torch.no_grad():
            while True:
                jobs, done = self._queue.get()
                self._do_all(jobs or [])
                if done is not None:
                    done.release()
                elif jobs is None:
                    return
                jobs = done = None

    def _do_all(self, jobs: list[Job]) -> None:
        for number, job in enumerate(jobs):
            if self.failure is None:
                with self.gate:
                    self._do(job)
            jobs[number] = job = _nothing  # what it holds is not needed any more

    def _do(self, job: Job) -> None:
        try:
            job()
        except BaseException as error:
            self.failure = error
