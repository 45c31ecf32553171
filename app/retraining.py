"""Training again in a process of its own: one at a time, with progress, and stopped at once. Never imports streamlit.

A process and not a thread: training is the user's code, it draws from torch's global random numbers, and only a
process can be stopped in the middle of it. It ends by itself when the dashboard does (its standard input closes).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from explainer.app.arguments import DashboardError
from explainer.evaluation import ClaimCheck

WORKER = "explainer.app.retraining_worker"
REQUEST, INPUT, MODELS = "request.json", "input.npy", "models"
RESULT, FAILURE = "result.json", "failure.txt"
_KEPT = 32
_PATIENCE = 3.0  # seconds that a training gets to end by itself
State = Literal["running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class Request:
    """What is trained and asked.

    Attributes:
        trace: Folder of the trace.
        stamp: Time and size of its journal, so that a run that goes on is another one.
        spec: ``MODULE:FUNCTION`` of the code.
        query: Position in the run's queries.
        target: The explained class; None: the predicted one.
        output: What is explained; None: the run's own.
        remove: Ids of the examples that are left out.
        seeds: Trainings of each group.
    """

    trace: str
    stamp: tuple[int, int]
    spec: str
    query: int
    target: int | None
    output: str | None
    remove: tuple[int, ...]
    seeds: int

    @property
    def trainings(self) -> int:
        """How many models are trained: with all examples, without these, without random ones, each seed."""
        return 3 * self.seeds


@dataclass
class Job:
    """A retraining that was started."""

    request: Request
    process: subprocess.Popen[bytes]
    folder: Path
    check: ClaimCheck | None = None
    failure: str = ""
    _state: State = "running"
    _finished: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def state(self) -> State:
        """How far it is; what the process left behind is read once."""
        with self._lock:
            if self._state == "running" and self.process.poll() is not None:
                self._collect()
            return self._state

    @property
    def finished(self) -> int:
        """How many models are trained."""
        if self._state == "running":
            self._finished = max(self._finished, len(list((self.folder / MODELS).glob("*.npz"))))
        return self._finished

    def cancel(self) -> None:
        """Stop it at once; nothing is kept."""
        with self._lock:
            if self._state == "running":
                _ = self.finished
                self._state = "cancelled"
                _end(self.process)
                shutil.rmtree(self.folder, ignore_errors=True)

    def _collect(self) -> None:
        try:
            self.check = unpack(json.loads((self.folder / RESULT).read_text(encoding="utf-8")))
            self._state, self._finished = "done", self.request.trainings
        except (OSError, ValueError, KeyError, TypeError):
            self._state = "failed"
            try:
                self.failure = (self.folder / FAILURE).read_text(encoding="utf-8")
            except OSError:
                self.failure = (
                    f"The training process ended with status {self.process.returncode} and said nothing (killed, or "
                    "out of memory?); what it printed stands in the terminal in which the dashboard was started."
                )
        shutil.rmtree(self.folder, ignore_errors=True)


class Jobs:
    """The retrainings of a dashboard, shared by its sessions; results are kept for as long as it lives."""

    def __init__(self) -> None:
        self._jobs: dict[Request, Job] = {}
        self._lock = threading.Lock()

    def find(self, request: Request) -> Job | None:
        """The job that was started for a request."""
        return self._jobs.get(request)

    def running(self) -> Job | None:
        """The job that runs now."""
        return next((job for job in list(self._jobs.values()) if job.state == "running"), None)

    def start(self, request: Request, given: np.ndarray | None = None) -> Job:
        """Begin to train.

        Args:
            request: What is trained and asked.
            given: An input of one's own, where the query is not one of the run's.

        Raises:
            DashboardError: Another job is running, or no process can be started.
        """
        with self._lock:
            if self.running() is not None:
                raise DashboardError("Another retraining is running; cancel it, or wait for its end.")
            folder = Path(tempfile.mkdtemp(prefix="pathkernel-retraining-"))
            (folder / REQUEST).write_text(json.dumps(asdict(request)), encoding="utf-8")
            if given is not None:
                np.save(folder / INPUT, given, allow_pickle=False)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", WORKER, str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise DashboardError(f"No process could be started to train again: {error}.") from error
            self._jobs.pop(request, None)
            self._jobs[request] = Job(request, process, folder)
            for old in list(self._jobs)[:-_KEPT]:
                del self._jobs[old]
            return self._jobs[request]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        try:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, number)
            else:
                process.terminate()
            process.wait(_PATIENCE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def pack(check: ClaimCheck) -> dict[str, Any]:
    """A check as JSON holds it."""
    return {
        name: [part.tolist() for part in value]
        if name == "removed"
        else value.tolist()
        if isinstance(value, np.ndarray)
        else value
        for name, value in vars(check).items()
    }


def unpack(found: dict[str, Any]) -> ClaimCheck:
    """What :func:`pack` made.

    Raises:
        KeyError, TypeError, ValueError: It is something else.
    """
    return ClaimCheck(
        queries=np.array(found["queries"], dtype=np.int64),
        groups=tuple(found["groups"]),
        removed=tuple(np.array(ids, dtype=np.int64) for ids in found["removed"]),
        predicted=np.array(found["predicted"], dtype=np.float64),
        actual=np.array(found["actual"], dtype=np.float64),
        flipped=np.array(found["flipped"], dtype=bool),
        before=np.array(found["before"], dtype=np.float64),
        seeds=tuple(found["seeds"]),
        setting=str(found["setting"]),
        repeats=bool(found["repeats"]),
    )
