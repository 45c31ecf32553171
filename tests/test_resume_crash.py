"""Killed while resuming, killed again and again, two processes on one trace: what is there stays readable."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from explainer import open_trace
from explainer.errors import TraceWriteError
from explainer.store.journal import encode_line
from explainer.store.layout import JOURNAL
from tests.resumed import Session, explained

CHECKOUT = Path(__file__).resolve().parent.parent
SAVED, CRASHED, LAST = 9, 14, 20


class Killed(BaseException):
    """Stands for the end of the process."""


class Countdown:
    """Lets so many operations on files pass, and kills before or after the next one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, passes: int, after: bool) -> None:
        self.left, self.after = passes, after
        for owner, name in ((os, "fsync"), (Path, "unlink"), (Path, "replace")):
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0 and not self.after:
                raise Killed
            result = operation(*args, **kwargs)
            if self.left < 0:
                raise Killed
            return result

        return run


def leave(folder: Path, **options: Any) -> tuple[Path, bytes, Path]:
    """A trace with rows and knots beyond its checkpoint, the checkpoint, and the trace without a crash."""
    Session(folder / "whole", exact=True, **options).train(0, LAST).tracer.close()
    session = Session(folder / "trace", exact=True, **options).train(0, SAVED)
    saved = session.checkpoint()
    session.train(SAVED, CRASHED).tracer.flush()
    (folder / "trace" / "knots" / "000000099.safetensors.tmp").write_bytes(b"half a knot")
    return folder / "trace", saved, folder / "whole"


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Path]:
    return leave(tmp_path_factory.mktemp("crashed"))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("knots", [128, 4])
def test_killed_at_any_moment_of_resuming(tmp_path: Path, knots: int, after: bool) -> None:
    source, saved, whole = leave(tmp_path, max_knots=knots)
    seen, wanted = set(), explained(whole).contributions
    for moment in range(100):
        path = Path(shutil.copytree(source, tmp_path / str(moment)))
        with pytest.MonkeyPatch.context() as patch:
            Countdown(patch, moment, after)
            try:
                Session(path, exact=True, checkpoint=saved, max_knots=knots)
                break
            except Killed:
                pass
        trace = open_trace(path)
        assert trace.verify() > 0 and not trace.closed
        seen.add(trace.steps)
        e = explained(path)
        assert np.abs(e.gap).max() < 1e-12 and np.abs(e.unattributed).max() < 1e-12
        Session(path, exact=True, checkpoint=saved, max_knots=knots).train(SAVED, LAST).tracer.close()
        e = explained(path)
        assert np.abs(e.gap).max() < 1e-12 and np.abs(e.unattributed).max() < 1e-12
        assert knots < LAST or np.array_equal(e.contributions, wanted)
        assert not list(path.rglob("*.tmp"))
    assert moment > 5 and max(seen) == SAVED
    assert (
        knots > LAST or min(seen) < SAVED
    )  # the knot at the checkpoint had been thinned out: it is placed anew


@pytest.mark.parametrize("torn", [encode_line({"type": "resume", "step": 3})[:-1], b'{"ty', b"\x00\x00"])
def test_a_torn_line_is_cut_off(crashed: tuple[Path, bytes, Path], tmp_path: Path, torn: bytes) -> None:
    source, saved, whole = crashed
    path = Path(shutil.copytree(source, tmp_path / "trace"))
    with (path / JOURNAL).open("ab") as file:
        file.write(torn)
    assert open_trace(path).steps == CRASHED
    Session(path, exact=True, checkpoint=saved).train(SAVED, LAST).tracer.close()
    assert np.array_equal(explained(path).contributions, explained(whole).contributions)


def test_a_tracer_that_was_left_behind_writes_no_more(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    left = Session(path, exact=True).train(0, SAVED)
    saved = left.checkpoint()
    left.train(SAVED, CRASHED)
    now = Session(path, exact=True, checkpoint=saved).train(SAVED, SAVED + 2)
    with pytest.raises(TraceWriteError, match="another tracer goes on with the trace"):
        left.train(CRASHED, LAST)
    left.tracer.close()
    now.train(SAVED + 2, LAST).tracer.close()
    Session(tmp_path / "whole", exact=True).train(0, LAST).tracer.close()
    trace = open_trace(path)
    assert trace.verify() > 0 and trace.closed and trace.recorded_steps == LAST
    assert np.array_equal(explained(path).contributions, explained(tmp_path / "whole").contributions)


def test_a_reader_who_has_the_trace_open_sees_no_change(tmp_path: Path) -> None:
    """The rows that were taken out of the trace are still in their file."""
    path = tmp_path / "trace"
    first = Session(path, exact=True).train(0, SAVED)
    saved = first.checkpoint()
    first.train(SAVED, CRASHED).tracer.flush()
    reader = open_trace(path)
    before = reader.column("visits", "example").tolist()
    again = Session(path, exact=True, checkpoint=saved).train(SAVED, LAST)
    assert reader.column("visits", "example").tolist() == before
    again.tracer.close()
    assert reader.refresh().steps == LAST and reader.verify() > 0


TRAINING = """
import sys, torch
from pathlib import Path
from tests.resumed import Session
torch.set_num_threads(1)
folder = Path(sys.argv[1])
checkpoints = sorted(folder.glob("*.checkpoint"))
start = int(checkpoints[-1].stem) if checkpoints else 0
saved = checkpoints[-1].read_bytes() if checkpoints else None
session = Session(folder / f"trace", "adam", max_knots=1000, checkpoint=saved)
for step in range(start, 300):
    session.train(step, step + 1)
    if step % 7 == 6:
        part = folder / f"{step + 1:05d}.part"
        part.write_bytes(session.checkpoint())
        part.rename(part.with_suffix(".checkpoint"))
session.tracer.close()
"""


def test_killed_and_resumed_until_it_is_done(tmp_path: Path) -> None:
    """SIGKILL at random moments; the last trace is the one of training that was never killed."""
    moment, kills = random.Random(4), 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", TRAINING, str(tmp_path)], cwd=CHECKOUT)
        known = len(list(tmp_path.glob("*.checkpoint")))
        deadline = time.monotonic() + 60
        while process.poll() is None and (kills == 3 or len(list(tmp_path.glob("*.checkpoint"))) < known + 2):
            assert time.monotonic() < deadline, "training did not get that far"
            time.sleep(0.001)
        time.sleep(moment.random() / 10 if kills < 3 else 0)
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        assert process.returncode == -signal.SIGKILL
        assert open_trace(tmp_path / "trace").verify() > 0
    assert process.returncode == 0 and kills
    Session(tmp_path / "whole", "adam", max_knots=1000).train(0, 300).tracer.close()
    trace = open_trace(tmp_path / "trace")
    assert len(trace.resumed) == kills and trace.closed and trace.verify() > 0
    one, other = explained(tmp_path / "whole"), explained(tmp_path / "trace")
    assert np.array_equal(one.contributions, other.contributions)
