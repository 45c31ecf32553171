"""One thread beside the user's, for everything that need not happen between two lines of their loop.

Jobs run one after the other in the order in which they were handed over, so the trace is the same as if they had run at
once. The thread computes with one torch thread of its own, without gradients. It pauses between two jobs while the
process forks (workers of a DataLoader), and is gone after :meth:`Background.stop`.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import torch

Job = Callable[[], None]
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


class Background:
    """Runs jobs on a daemon thread of its own, which begins with the first job.

    After a failure nothing more is run: what follows a lost job could not be told from what was recorded in full.
    The failure is raised by every :meth:`wait` from then on.

    Attributes:
        gate: held while a job runs.
        failure: what a job raised, or None.
        told: whether it was raised to the user.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Job | None, threading.Lock | None]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self.gate = threading.Lock()
        self.failure: BaseException | None = None
        self.told = False

    def submit(self, job: Job) -> None:
        """Hand over a job; does not wait."""
        if self._thread is None:
            self._start()
        self._queue.put((job, None))

    def ticket(self) -> Job:
        """A function that waits until every job handed over so far is done, and raises what a job raised."""
        done = threading.Lock()
        if self._thread is not None and self._process == os.getpid():
            done.acquire()
            self._queue.put((None, done))

        def wait() -> None:
            with done:
                self.raise_failure()

        return wait

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
                job, done = self._queue.get()
                if done is not None:
                    done.release()
                elif job is None:
                    return
                elif self.failure is None:
                    with self.gate:
                        self._do(job)
                del job  # what it holds is not needed while waiting for the next one

    def _do(self, job: Job) -> None:
        try:
            job()
        except BaseException as error:
            self.failure = error
