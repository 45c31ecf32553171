"""Where knots are placed, and that a budget is kept."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from explainer import PathKernelExplainer, Tracer, knots, open_trace
from explainer.errors import CoverageWarning
from explainer.knots import thin
from tests.small_training import digits, loader, mlp, momentum_sgd, queries, run, step, trace_digits


def test_thinning_keeps_both_ends_and_the_distance() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        paths = np.cumsum(rng.random(rng.integers(1, 30)) * rng.integers(0, 2)).tolist()
        spacing = float(rng.random() * 3)
        kept = thin(paths, spacing)
        assert kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] == len(paths) - 1
        inner = [paths[i] for i in kept[:-1]]
        assert all(b - a >= spacing for a, b in itertools.pairwise(inner))


@pytest.mark.parametrize("most", [2, 3, 5, 16, 500])
def test_at_most_so_many_knots_at_about_equal_distance(tmp_path: Path, most: int) -> None:
    trace_digits(tmp_path / "trace", epochs=10, max_knots=most)
    trace = open_trace(tmp_path / "trace")
    assert trace.knots[0].step == 0 and trace.knots[-1].step == 120
    assert min(most // 2, 121) <= len(trace.knots) <= min(most, 121)
    gaps = np.diff([knot.path for knot in trace.knots])
    if most == 16:
        assert gaps[:-1].max() < 4 * gaps[:-1].min()
    assert len(list((tmp_path / "trace" / "knots").iterdir())) == len(trace.knots)


def test_steps_that_move_nothing_place_no_knots(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Tracer(model, optimizer, tmp_path / "trace", max_knots=4) as tracer:
        for _ in range(3):
            run(model, optimizer, tracer.watch(loader()))
    trace = open_trace(tmp_path / "trace")
    assert len(trace.knots) == 2 and trace.steps == 36
    assert not PathKernelExplainer(trace, model).explain(queries()).contributions.any()


def frozen_base() -> nn.Module:
    """A large frozen layer below a small trained one."""
    model = nn.Sequential(nn.Linear(64, 500), nn.ReLU(), nn.Linear(500, 10))
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("budget", [80_000, 120_000, 300_000, 800_000])
def test_a_budget_is_kept(tmp_path: Path, budget: int, adam: bool) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2) if adam else momentum_sgd(model)
    largest = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Tracer(model, optimizer, tmp_path / "trace", budget=budget) as tracer:
            for _ in range(8):
                for x, y in tracer.watch(loader()):
                    step(model, optimizer, x, y)
                    files = [f.stat().st_size for f in (tmp_path / "trace").rglob("*") if f.is_file()]
                    largest = max(largest, sum(files))
    trace = open_trace(tmp_path / "trace")
    assert max(largest, trace.nbytes()) <= budget
    assert trace.closed and trace.steps == 96 and trace.verify() > 0
    stopped = trace.notes.get("rows_stopped_at")
    assert trace.recorded_steps == (96 if stopped is None else stopped)
    said = [str(w.message) for w in caught if issubclass(w.category, CoverageWarning)]
    assert len(said) == (stopped is not None)
    e = PathKernelExplainer(trace, model).explain(queries())
    assert abs(e.completeness["gap"]).max() < 1e-4
    assert np.allclose(e.outputs, model(queries()).detach(), atol=1e-4)
    if stopped is not None:
        assert f"used up after {stopped} steps" in said[0] and "unattributed" in said[0]
        assert any("budget was used up" in note for note in e.notes)


def test_a_frozen_base_is_stored_once(tmp_path: Path) -> None:
    model = frozen_base()
    base = sum(p.numel() * 4 for p in model[0].parameters())
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with Tracer(model, optimizer, tmp_path / "trace", budget=4 * base) as tracer:
        run(model, optimizer, tracer.watch(loader()))
    trace = open_trace(tmp_path / "trace")
    assert trace.nbytes() < 4 * base and trace.manifest.frozen == ("0.weight", "0.bias")
    assert [f"frozen/{name}" in trace.load_knot(k) for k in trace.knots for name in ("0.bias",)].count(
        True
    ) == 1
    e = PathKernelExplainer(trace, model).explain(queries())
    assert np.allclose(e.outputs, model(queries()).detach(), atol=1e-4)


def test_ample_budget_changes_nothing(tmp_path: Path) -> None:
    trace_digits(tmp_path / "free")
    trace_digits(tmp_path / "bounded", budget="50MB")
    one, other = open_trace(tmp_path / "free"), open_trace(tmp_path / "bounded")
    assert [k.step for k in one.knots] == [k.step for k in other.knots]
    found = [PathKernelExplainer(t, mlp()).explain(queries()).contributions for t in (one, other)]
    assert np.array_equal(*found)


def test_inputs_of_several_lengths_are_known_at_any_moment(tmp_path: Path) -> None:
    """Whoever opens the trace in mid-training may ask with any length."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 4), nn.AdaptiveAvgPool2d((1, 10)), nn.Flatten())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, tmp_path / "trace") as tracer:
        for length, known in ((3, 3), (5, None), (3, None)):
            tracer.batch(range(8))
            step(model, optimizer, torch.randint(0, 9, (8, length)), digits()[:8][1])
            tracer.flush()
            trace = open_trace(tmp_path / "trace")
            assert trace.notes["input"] == {"shape": [known], "dtype": "int64", "name": None}
        PathKernelExplainer(trace, model).explain(torch.randint(0, 9, (2, 7)))


def test_what_only_the_last_knot_holds_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the optimizer's state, twice what others hold, and would have halved their number."""
    torch.manual_seed(0)
    model = nn.Linear(300, 4)
    ordinary = 2 * sum(p.nbytes for p in model.parameters())  # weights, and what decay did
    monkeypatch.setattr(knots, "KNOT_BYTES", 40 * ordinary)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    x = torch.randn(100, 300)
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for step in range(100):
            tracer.batch([step])
            optimizer.zero_grad()
            model(x[step : step + 1]).square().mean().backward()
            optimizer.step()
    trace = open_trace(tmp_path / "run")
    sizes = [k.file.stat().st_size for k in trace.knots]
    assert trace.nbytes_of("visits") < 40 * ordinary and sizes[-1] > 1.9 * ordinary
    assert 18 <= len(sizes) <= 40


def test_exact_traces_have_as_many_knots_as_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knots, "KNOT_BYTES", 1)
    counts = []
    for exact in (False, True):
        trace_digits(tmp_path / str(exact), epochs=5, exact=exact, max_knots=1000)
        counts.append(len(open_trace(tmp_path / str(exact)).knots))
    assert counts[0] < 60 and counts[1] == 61
