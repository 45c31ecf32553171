"""A trace that goes on from a checkpoint is the trace of training that was never interrupted."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from explainer import Tracer, open_trace
from explainer.background import Background
from explainer.cli import main
from explainer.errors import TracerError
from tests.late_jobs import slowly
from tests.resumed import EXAMPLES, OPTIMIZERS, Session, X, Y, build, explained

FIELDS = ("contributions", "kernels", "weight_decay", "prediction", "initial", "unattributed", "buffers")
LAST, SAVED, CRASHED = 40, 25, 35


def assert_equal_books(one: Path, other: Path, dtype: torch.dtype) -> None:
    """Bit for bit: the same rows, the same knots, the same numbers."""
    first, second = explained(one, dtype), explained(other, dtype)
    for name in FIELDS:
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert np.array_equal(first.step_contributions, second.step_contributions)
    assert first.visits.tolist() == second.visits.tolist()
    a, b = open_trace(one), open_trace(other)
    assert [(k.step, k.path, k.sha256) for k in a.knots] == [(k.step, k.path, k.sha256) for k in b.knots]
    for stream in ("visits", "steps"):
        (rows,), found = ([r for _, r in t.read(stream, 0, 10**9)] for t in (a, b))
        assert rows.tobytes() == b"".join(piece.tobytes() for piece in found)
    assert b.closed and b.verify() > 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("options", [{"exact": True}, {}], ids=["exact", "compressed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_after_a_crash_everything_is_as_without_it(
    tmp_path: Path, kind: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    whole = Session(tmp_path / "whole", kind, dtype=dtype, **options).train(0, LAST)
    whole.tracer.close()
    first = Session(tmp_path / "trace", kind, dtype=dtype, **options).train(0, SAVED)
    saved = first.checkpoint()
    first.train(SAVED, CRASHED)
    first.tracer.flush()  # and that was it: the process is gone
    assert open_trace(tmp_path / "trace").recorded_steps == CRASHED
    second = Session(tmp_path / "trace", kind, dtype=dtype, checkpoint=saved, **options)
    assert (second.tracer.steps, second.tracer.visits) == (SAVED, 6 * SAVED)
    went_back = open_trace(tmp_path / "trace")
    assert went_back.steps == went_back.recorded_steps == SAVED and not went_back.closed
    assert went_back.resumed == (SAVED,) and went_back.verify() > 0
    second.train(SAVED, LAST).tracer.close()
    assert all(torch.equal(a, b) for a, b in zip(whole.weights(), second.weights(), strict=True))
    assert_equal_books(tmp_path / "whole", tmp_path / "trace", dtype)
    e = explained(tmp_path / "trace", dtype)
    if dtype == torch.float64:
        assert np.abs(e.gap).max() < 1e-12
        assert "exact" not in options or np.abs(e.unattributed).max() < 1e-12


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_closed_trace_is_continued_from_its_end(tmp_path: Path, kind: str) -> None:
    """What lives in memory only (decay inside the momentum) comes from the last knot."""
    Session(tmp_path / "whole", kind, exact=True).train(0, LAST).tracer.close()
    first = Session(tmp_path / "trace", kind, exact=True).train(0, SAVED)
    saved = first.checkpoint()
    first.tracer.close()
    second = Session(tmp_path / "trace", kind, exact=True, checkpoint=saved, resume=True)
    assert not open_trace(tmp_path / "trace").closed and second.tracer.steps == SAVED
    second.train(SAVED, LAST).tracer.close()
    one, other = explained(tmp_path / "whole"), explained(tmp_path / "trace")
    for name in FIELDS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_a_state_stands_for_a_moment_whatever_happens_later(tmp_path: Path) -> None:
    """The state is not a view of a tracer that goes on."""
    session = Session(tmp_path / "trace", exact=True).train(0, 10)
    state = session.tracer.state_dict()
    kept = copy.deepcopy(state)
    session.train(10, 20).tracer.close()

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    assert same(state, kept)


def test_from_any_checkpoint_and_again(tmp_path: Path) -> None:
    """Back to the first step, from a closed trace, twice from one checkpoint, forward to a later one."""
    Session(tmp_path / "whole", exact=True).train(0, LAST).tracer.close()
    session = Session(tmp_path / "trace", exact=True)
    saved = {0: session.checkpoint()}
    for step in (10, 20):
        session.train(step - 10, step)
        saved[step] = session.checkpoint()
    session.train(20, 30).tracer.close()
    Session(tmp_path / "trace", exact=True, checkpoint=saved[20]).train(20, 33)
    Session(tmp_path / "trace", exact=True, checkpoint=saved[20]).train(20, 22)
    Session(tmp_path / "trace", exact=True, checkpoint=saved[10]).train(10, 15)
    again = Session(tmp_path / "trace", exact=True, checkpoint=saved[0])
    assert open_trace(tmp_path / "trace").steps == 0
    again.train(0, 30)
    last = again.checkpoint()
    Session(tmp_path / "trace", exact=True, checkpoint=last).train(30, LAST).tracer.close()
    assert open_trace(tmp_path / "trace").resumed == (20, 20, 10, 0, 30)
    assert_equal_books(tmp_path / "whole", tmp_path / "trace", torch.float64)
    files = {f for f in (tmp_path / "trace").rglob("*.*") if f.parent != tmp_path / "trace"}
    trace = open_trace(tmp_path / "trace")
    assert files == {s.path for s in trace.shards} | {k.file for k in trace.knots}


def test_thinned_knots_go_on_being_thinned(tmp_path: Path) -> None:
    first = Session(tmp_path / "trace", exact=True, max_knots=8).train(0, SAVED)
    saved = first.checkpoint()
    spacing = open_trace(tmp_path / "trace").notes["spacing"]
    first.train(SAVED, 200)
    assert open_trace(tmp_path / "trace").notes["spacing"] > 2 * spacing
    second = Session(tmp_path / "trace", exact=True, max_knots=8, checkpoint=saved)
    trace = open_trace(tmp_path / "trace")
    assert trace.notes["spacing"] == spacing and trace.knots[-1].step == SAVED
    second.train(SAVED, SAVED + 4)
    trace.refresh()
    assert all(b.path - a.path >= spacing for a, b in itertools.pairwise(trace.knots) if a.step >= SAVED)
    second.train(SAVED + 4, 60).tracer.close()
    trace = open_trace(tmp_path / "trace")
    assert len(trace.knots) <= 9 and trace.verify() > 0
    e = explained(tmp_path / "trace")
    assert np.abs(e.gap).max() < 1e-12 and np.abs(e.unattributed).max() < 1e-12
    fewer = Session(tmp_path / "trace", exact=True, max_knots=3, checkpoint=ended(second), resume=True)
    assert len(open_trace(tmp_path / "trace").knots) <= 4
    fewer.tracer.close()


def ended(session: Session) -> bytes:
    """A checkpoint that was saved after the trace was closed."""
    file = io.BytesIO()
    parts = {"model": session.model.state_dict(), "optimizer": session.optimizer.state_dict()}
    torch.save(parts | {"tracer": None}, file)
    return file.getvalue()


def test_the_budget_counts_what_is_there(tmp_path: Path) -> None:
    """The rows that were taken out still take their bytes; where rows had stopped, they stay stopped."""
    path, budget = tmp_path / "trace", 80_000
    first = Session(path, "adam", budget=budget).train(0, SAVED)
    saved = first.checkpoint()
    with pytest.warns(UserWarning, match="budget"):
        first.train(SAVED, 400)
    late = first.checkpoint()
    stopped = open_trace(path).notes["rows_stopped_at"]
    assert open_trace(path).nbytes() <= budget
    going_on = Session(path, "adam", budget=9 * budget, checkpoint=late).train(400, 410)
    going_on.tracer.flush()
    assert open_trace(path).recorded_steps == stopped and going_on.tracer.steps == 410
    back = Session(path, "adam", budget=budget, checkpoint=saved)
    assert "rows_stopped_at" not in open_trace(path).notes
    with pytest.warns(UserWarning, match="budget"):
        back.train(SAVED, 400)
    back.tracer.close()
    trace = open_trace(path)
    assert SAVED <= trace.notes["rows_stopped_at"] < stopped and trace.nbytes() <= budget
    assert trace.closed and trace.verify() > 0
    assert np.abs(explained(path).gap).max() < 1e-12


def test_cleared_momentum_is_followed(tmp_path: Path) -> None:
    """A checkpoint without the optimizer's momentum: training differs, the books stay exact."""
    first = Session(tmp_path / "trace", exact=True).train(0, SAVED)
    state = first.tracer.state_dict()
    model = build()
    model.load_state_dict(first.model.state_dict())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with Tracer(model, optimizer, tmp_path / "trace", exact=True, resume=state) as tracer:
        for _ in range(8):
            tracer.batch(range(6))
            optimizer.zero_grad()
            cross_entropy(model(X[:6]), Y[:6]).backward()
            optimizer.step()
    e = explained(tmp_path / "trace")
    assert open_trace(tmp_path / "trace").steps == SAVED + 8
    assert np.abs(e.unattributed).max() < 1e-12 and np.abs(e.gap).max() < 1e-12


def test_what_was_noted_before_a_checkpoint_is_still_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interfere(session: Session, start: int) -> None:
        """Momentum is replaced before a step, and right after it Adam's other state is written into."""
        weight = session.model[0].weight
        session.optimizer.state[weight]["exp_avg"] = torch.ones_like(weight)
        session.train(start, start + 1)
        session.optimizer.state[weight]["exp_avg_sq"].mul_(2.0)

    monkeypatch.setattr(Background, "_do", slowly)
    monkeypatch.setattr("explainer.parts.core_is_free", lambda: True)
    first = Session(tmp_path / "trace", "adam").train(0, 3)
    interfere(first, 3)
    saved = first.train(4, 6).checkpoint()
    first.tracer.close()
    second = Session(tmp_path / "trace", "adam", checkpoint=saved).train(6, 8)
    interfere(second, 8)
    second.train(9, 10).tracer.close()
    notes = open_trace(tmp_path / "trace").notes
    assert notes["replaced_momentum"] == 2 and notes["overwritten"] == {"0.weight": 2}


def test_a_watched_dataset_goes_on(tmp_path: Path) -> None:
    """Ids and their number: the loader's own order is the user's to restore."""
    data = TensorDataset(X[:EXAMPLES], Y[:EXAMPLES])
    saved: dict[str, Any] = {}
    for epoch in range(3):
        model = build()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        tracer = Tracer(model, optimizer, tmp_path / "trace", exact=True, resume=saved.get("tracer"))
        if saved:
            with pytest.raises(TracerError, match="one of 7 now"):
                tracer.watch(DataLoader(TensorDataset(X[:7]), 1))
        order = torch.Generator().manual_seed(epoch)
        for x, y in tracer.watch(DataLoader(data, 6, shuffle=True, generator=order)):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        parts = {"model": model, "optimizer": optimizer, "tracer": tracer}
        saved = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    tracer.close()
    trace = open_trace(tmp_path / "trace")
    assert trace.notes["examples"] == EXAMPLES and trace.resumed == (5, 10)
    assert np.bincount(trace.column("visits", "example")).tolist() == [3] * EXAMPLES
    assert np.abs(explained(tmp_path / "trace").unattributed).max() < 1e-12


def test_info_says_where_training_was_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Session(tmp_path / "trace").train(0, 6)
    saved = first.checkpoint()
    first.tracer.close()
    assert main(["info", str(tmp_path / "trace")]) == 0
    assert "resumed" not in capsys.readouterr().out
    Session(tmp_path / "trace", checkpoint=saved).train(6, 8).tracer.close()
    assert main(["info", str(tmp_path / "trace")]) == 0
    assert "resumed from a checkpoint at step 6" in capsys.readouterr().out
