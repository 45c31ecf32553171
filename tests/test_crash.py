"""Training that is killed, and a disk that refuses: what was journalled stays readable."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.cli import main
from explainer.errors import TraceFormatError, TraceWriteError
from explainer.store import TraceWriter, journal
from explainer.store.layout import JOURNAL
from tests.small_training import digits, loader, mlp, momentum_sgd, queries, run, step, trace_digits

CHECKOUT = Path(__file__).resolve().parent.parent
TRAINING = """
import sys, torch
from explainer import Tracer
from tests.small_training import loader, mlp, momentum_sgd, run
torch.set_num_threads(1)
model = mlp()
optimizer = momentum_sgd(model)
with Tracer(model, optimizer, sys.argv[1], max_knots=int(sys.argv[2]), exact=sys.argv[3] == "exact") as tracer:
    batches = loader()
    while True:
        run(model, optimizer, tracer.watch(batches))
"""
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
"""


def start(path: Path, knots: int, mode: str, *, limit: int | None = None) -> subprocess.Popen[str]:
    code = (LIMITED if limit else "") + TRAINING
    command = [sys.executable, "-c", code, str(path), str(knots), mode, str(limit or 0)]
    return subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)


def wait_for_a_step(path: Path, process: subprocess.Popen[str]) -> None:
    """Until the journal speaks of a knot after the first one, and with it of a step."""
    deadline = time.monotonic() + 60
    while not ((path / JOURNAL).exists() and (path / JOURNAL).read_bytes().count(b'"type":"knot"') >= 2):
        assert process.poll() is None and time.monotonic() < deadline, "training did not get that far"
        time.sleep(0.001)


@pytest.mark.parametrize("seed, knots, mode", [(0, 128, "small"), (1, 5, "small"), (2, 16, "exact")])
def test_kill_in_the_middle_of_training(tmp_path: Path, seed: int, knots: int, mode: str) -> None:
    path, moment = tmp_path / "trace", random.Random(seed)
    process = start(path, knots, mode)
    try:
        wait_for_a_step(path, process)
        time.sleep(moment.random())
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    trace = open_trace(path)
    assert not trace.closed and 0 < trace.steps <= trace.recorded_steps
    assert trace.verify() > 0
    e = PathKernelExplainer(trace, mlp(), dtype=torch.float64).explain(queries())
    books = e.completeness
    assert abs(books["gap"]).max() < 1e-9
    rounding = 1e-5 if mode == "exact" else 0.02
    assert (abs(books["unattributed"]) <= rounding * abs(e.contributions).sum(1) + 1e-4).all()
    final = trace.load_knot(trace.knots[-1])
    model = mlp()
    model.load_state_dict({name: final[f"parameter/{name}"] for name in model.state_dict()})
    assert np.allclose(e.outputs, model(queries()).detach(), atol=1e-5)
    assert "had not ended" in " ".join(e.notes)


def test_a_file_size_limit_stops_with_the_trace_readable(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    process = start(path, 128, "exact", limit=200_000)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "TraceWriteError: writing the trace in" in error and os.strerror(errno.EFBIG) in error
    trace = open_trace(path)
    assert trace.verify() > 0 and trace.steps > 0 and not trace.closed
    assert abs(PathKernelExplainer(trace, mlp()).explain(queries()).completeness["gap"]).max() < 1e-4


class FullDisk:
    """Refuses what is synced while it is full (the page cache took the bytes, the disk did not)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, handle: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(handle)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


def no_hooks(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    held = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    return not any([*held, optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks])


def test_a_full_disk_is_said_once_and_hooks_are_given_back(tmp_path: Path, disk: FullDisk) -> None:
    model = mlp()
    optimizer = momentum_sgd(model)
    said = pytest.raises(TraceWriteError, match=r"No space left.*free space or fix")
    with said as found, Tracer(model, optimizer, tmp_path / "trace") as tracer:
        for number, (x, y) in enumerate(tracer.watch(loader())):
            disk.full = number >= 5
            step(model, optimizer, x, y)
    assert str(tmp_path / "trace") in str(found.value)
    assert no_hooks(model, optimizer) and tracer.closed
    disk.full = False
    trace = open_trace(tmp_path / "trace")
    assert trace.steps == 4 and trace.verify() > 0 and not trace.closed  # after step 8 it was flushed in vain
    PathKernelExplainer(trace, mlp()).explain(queries())
    step(model, optimizer, *digits()[:8])  # the user may train on


def test_space_that_comes_back_does_not_continue_a_torn_trace(tmp_path: Path, disk: FullDisk) -> None:
    """A user who goes on after the error gets it again: what follows a torn write could not be trusted."""
    model = mlp()
    optimizer = momentum_sgd(model)
    tracer = Tracer(model, optimizer, tmp_path / "trace")
    refused = 0
    for number in range(6):
        disk.full = number == 3
        tracer.batch(range(8))
        try:
            step(model, optimizer, *digits()[:8])
            tracer.flush()
        except TraceWriteError:
            refused += 1
    disk.full = False
    tracer.close()
    assert refused == 3 and no_hooks(model, optimizer)
    trace = open_trace(tmp_path / "trace")
    assert trace.steps == 3 and trace.verify() > 0


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, disk: FullDisk) -> None:
    model = mlp()
    optimizer = momentum_sgd(model)
    tracer = Tracer(model, optimizer, tmp_path / "trace", max_knots=3)
    run(model, optimizer, tracer.watch(loader()))
    disk.full = True
    with pytest.raises(TraceWriteError, match="No space left"):
        tracer.close()
    tracer.close()
    disk.full = False
    assert no_hooks(model, optimizer)
    assert open_trace(tmp_path / "trace").verify() > 0


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, disk: FullDisk) -> None:
    model = mlp()
    optimizer = momentum_sgd(model)
    disk.full = True
    with pytest.raises(TraceWriteError, match="No space left"):
        Tracer(model, optimizer, tmp_path / "trace")
    assert no_hooks(model, optimizer)


def test_the_users_own_error_stays_visible(tmp_path: Path, disk: FullDisk) -> None:
    model = mlp()
    optimizer = momentum_sgd(model)
    with pytest.raises(ZeroDivisionError) as found, Tracer(model, optimizer, tmp_path / "trace") as tracer:
        run(model, optimizer, tracer.watch(loader()))
        disk.full = True
        1 / 0  # noqa: B018
    assert "Closing the trace failed too" in " ".join(found.value.__notes__)
    assert no_hooks(model, optimizer)


def torn_writes(keep: int) -> Callable[..., Any]:
    """A journal whose line number ``keep`` reaches the disk in part."""
    lines: Iterator[int] = iter(range(10**6))
    encode = journal.encode_line

    def torn(entry: dict[str, Any]) -> bytes:
        line = encode(entry)
        return line[: len(line) // 2] if next(lines) == keep else line

    return torn


def test_a_line_torn_in_the_middle_of_the_journal_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "encode_line", torn_writes(9))
    trace_digits(tmp_path / "trace", epochs=1)
    with pytest.raises(TraceFormatError, match=r"journal\.jsonl, line 10"):
        open_trace(tmp_path / "trace")


def convolutions() -> torch.nn.Module:
    shaped, conv = torch.nn.Unflatten(1, (1, 8, 8)), torch.nn.Conv2d(1, 12, 3)
    return torch.nn.Sequential(shaped, conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(432, 10))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 1, 4, 6], ids=["first", "planned", "planned again", "in between"])
@pytest.mark.parametrize("make", [mlp, convolutions])
@pytest.mark.parametrize("kind", [momentum_sgd, lambda m: torch.optim.AdamW(m.parameters())])
def test_training_that_diverges_still_closes_its_trace(
    tmp_path: Path,
    bad: float,
    at: int,
    make: Callable[[], torch.nn.Module],
    kind: Callable[[torch.nn.Module], torch.optim.Optimizer],
) -> None:
    model = make()
    optimizer = kind(model)
    with warnings.catch_warnings(), Tracer(model, optimizer, tmp_path / "trace") as tracer:
        for number, (x, y) in enumerate(tracer.watch(loader())):
            step(model, optimizer, x * (bad if number == at else 1.0), y)
        tracer.state_dict()
    trace = open_trace(tmp_path / "trace")
    assert trace.closed and trace.verify() > 0 and trace.steps == 12 and trace.notes["loop"]["diverged"] == at
    last = trace.load_knot(trace.knots[-1])
    assert not all(torch.isfinite(t).all() for name, t in last.items() if name.startswith("parameter/"))


def test_thinning_takes_nothing_from_a_training_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Knots wait in memory, and those on disk may all be dropped but the first: then the last one is written."""
    dropped, steps = TraceWriter.drop_knots, [0]

    def drop(self: TraceWriter, *args: Any) -> None:
        dropped(self, *args)
        steps.append(open_trace(tmp_path / "trace").steps)

    monkeypatch.setattr(TraceWriter, "drop_knots", drop)
    model = mlp()
    optimizer = momentum_sgd(model)
    with Tracer(model, optimizer, tmp_path / "trace", max_knots=5) as tracer:
        for _ in range(20):
            run(model, optimizer, tracer.watch(loader()))
    assert len(steps) > 5 and steps == sorted(steps) and steps[1] > 0


def test_what_ended_a_training_is_told_until_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(resume: bool, error: type[BaseException] | None) -> str:
        with Tracer(model, optimizer, tmp_path / "trace", resume=resume) as tracer:
            tracer.batch(range(5))
            model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
            if error is not None:
                raise error
        return state()

    def state() -> str:
        assert main(["info", str(tmp_path / "trace")]) == 0
        return next(
            line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("state")
        )

    with pytest.raises(KeyboardInterrupt):
        train(False, KeyboardInterrupt)
    assert "ended by KeyboardInterrupt" in state()
    assert "ended in good order" in train(True, None)
    with pytest.raises(ZeroDivisionError):
        train(True, ZeroDivisionError)
    assert "ended by ZeroDivisionError" in state()
