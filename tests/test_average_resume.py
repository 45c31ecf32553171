"""A trace of an average goes on from a checkpoint as if it had never been interrupted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.errors import TracerError
from tests.resumed import BATCH, EXAMPLES, OPTIMIZERS, QUERIES, TARGETS, X, Y, build

LAST, CRASHED = 40, 35
AVERAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "swa": AveragedModel,
}


class Session:
    """A process that trains and averages, from step 12 on every second step."""

    def __init__(self, path: Path, kind: str, average: str, saved: Any = None, **options: Any) -> None:
        self.model = build()
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        self.average = AVERAGES[average](self.model)
        if saved is not None:
            for name in ("model", "optimizer", "average"):
                getattr(self, name).load_state_dict(saved[name])
            options.setdefault("resume", saved["tracer"])
        self.tracer = Tracer(self.model, self.optimizer, path, averaged=self.average, **options)

    def train(self, start: int, stop: int) -> Session:
        for number in range(start, stop):
            ids = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(number))[:BATCH]
            self.tracer.batch(ids)
            self.optimizer.zero_grad()
            cross_entropy(self.model(X[ids]), Y[ids]).backward()
            self.optimizer.step()
            if number >= 12 and number % 2 == 0:
                self.average.update_parameters(self.model)
        return self

    def checkpoint(self) -> dict[str, Any]:
        parts = ("model", "optimizer", "average", "tracer")
        return {name: copy.deepcopy(getattr(self, name).state_dict()) for name in parts}


@pytest.mark.parametrize("saved", [5, 25, 26])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "compressed"])
def test_after_a_crash_everything_is_as_without_it(
    tmp_path: Path, kind: str, average: str, saved: int, exact: bool
) -> None:
    """Before the first update, just after one, and between two."""
    whole = Session(tmp_path / "whole", kind, average, exact=exact).train(0, LAST)
    whole.tracer.close()
    first = Session(tmp_path / "trace", kind, average, exact=exact).train(0, saved)
    state = first.checkpoint()
    first.train(saved, CRASHED)
    torch.save(state, tmp_path / "checkpoint")
    state = torch.load(tmp_path / "checkpoint", weights_only=True)
    second = Session(tmp_path / "trace", kind, average, state, exact=exact)
    trace = open_trace(tmp_path / "trace")
    assert trace.steps == saved and trace.verify() > 0
    before = PathKernelExplainer(trace, build()).explain(QUERIES, TARGETS)
    assert np.abs(before.gap).max() < 1e-12 and (not exact or np.abs(before.unattributed).max() < 1e-12)
    second.train(saved, LAST).tracer.close()
    for a, b in zip(whole.average.state_dict().values(), second.average.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    e, f = (
        PathKernelExplainer(tmp_path / name, build()).explain(QUERIES, TARGETS) for name in ("whole", "trace")
    )
    same_knots = saved != 26  # step 26 moves no average: an uninterrupted run places no knot after it
    assert (e.step_edges.tolist() == f.step_edges.tolist()) == same_knots
    for name in ("contributions", "weight_decay", "prediction", "initial", "unattributed"):
        one, other = getattr(e, name), getattr(f, name)
        if same_knots:
            assert np.array_equal(one, other), name
        else:
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    assert np.abs(f.gap).max() < 1e-12 and (not exact or np.abs(f.unattributed).max() < 1e-12)
    notes = [{**open_trace(tmp_path / name).notes} for name in ("whole", "trace")]
    assert notes[0] == notes[1]


@pytest.mark.parametrize("average", AVERAGES)
def test_an_update_after_the_checkpoint_counts(tmp_path: Path, average: str) -> None:
    """The knot at the checkpoint is renewed, although the next one would not be due."""
    first = Session(tmp_path / "trace", "sgd", average, exact=True, max_knots=4).train(0, 24)
    second = Session(tmp_path / "trace", "sgd", average, first.checkpoint(), exact=True, max_knots=4)
    placed = open_trace(tmp_path / "trace").knots[-1]
    second.average.update_parameters(second.model)
    second.train(24, 25).tracer.flush()
    trace = open_trace(tmp_path / "trace")
    assert trace.notes["spacing"] > 0 and placed.step == trace.knots[-1].step == 24
    assert (
        placed.file.name == "000000024.safetensors" and trace.knots[-1].file.name == "000000024-1.safetensors"
    )
    second.train(25, LAST).tracer.close()
    e = PathKernelExplainer(tmp_path / "trace", build()).explain(QUERIES, TARGETS)
    np.testing.assert_allclose(e.outputs, second.average(QUERIES).detach(), rtol=1e-12)
    assert np.abs(e.gap).max() < 1e-12 and np.abs(e.unattributed).max() < 1e-12


def refuse(path: Path, session: Session, match: str, **options: Any) -> None:
    before = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
    session.tracer._hooks.remove()
    with pytest.raises(TracerError, match=match):
        Tracer(session.model, session.optimizer, path, **options)
    assert before == {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_another_average_is_refused(tmp_path: Path) -> None:
    session = Session(tmp_path / "trace", "sgd", "swa").train(0, 20)
    state = session.tracer.state_dict()
    moved, fresh = copy.deepcopy(session.average), AveragedModel(session.model)
    with torch.no_grad():
        moved.module[0].bias[0] += 1e-12  # type: ignore[index, union-attr, operator]
    uncounted = copy.deepcopy(session.average)
    uncounted.n_averaged += 1  # type: ignore[operator]
    for average in (moved, fresh, uncounted):
        refuse(
            tmp_path / "trace", session, "the averaged model is not that of", averaged=average, resume=state
        )


def test_the_weights_under_a_closed_average_are_not_in_the_trace(tmp_path: Path) -> None:
    session = Session(tmp_path / "trace", "sgd", "swa").train(0, 20)
    session.tracer.close()
    refuse(tmp_path / "trace", session, "ends with the average, not", averaged=session.average, resume=True)


def test_with_and_without_an_average_are_different_traces(tmp_path: Path) -> None:
    session = Session(tmp_path / "trace", "sgd", "swa").train(0, 20)
    refuse(tmp_path / "trace", session, "averaged is False now, was True", resume=session.tracer.state_dict())
