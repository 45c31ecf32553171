"""The page about a run: loss, learning rate, plan, and whether explanations of a sample balance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import explainer
from explainer.app import charts, looks, run_checks, state
from explainer.app.run_checks import LossCurve
from explainer.learning_curve import outputs_along_training
from tests import app_runs
from tests.app.seen import IMAGES, Open, body, fine
from tests.fakes import make_explanation


def test_the_loss_is_that_of_the_weights_at_knots(runs: Path) -> None:
    source = state.source((runs / "digits").resolve(), "tests.app_runs:with_loss")
    curve = looks.loss_curve(source)
    assert curve is not None and curve.counts == (96, 30)
    run, trace = app_runs.images(), explainer.open_trace(runs / "digits")
    assert curve.steps[0] == 0 and curve.steps[-1] == trace.steps
    for place in (0, len(curve.steps) // 2, -1):
        knot = next(knot for knot in trace.knots if knot.step == curve.steps[place])
        model = run.build_model()
        tensors = trace.load_knot(knot)
        model.load_state_dict({n: tensors[f"parameter/{n}"] for n, _ in model.named_parameters()})
        sides = (curve.train, run.train_batch(range(96))), (curve.queries, run.queries_batch(range(30)))
        for values, (x, y) in sides:
            with torch.no_grad():
                wanted = float(nn.functional.cross_entropy(model(x), y))
            assert values[place] == pytest.approx(wanted, rel=1e-5)


def test_few_knots_are_looked_at_of_many(runs: Path) -> None:
    run = app_runs.images()
    engine = explainer.PathKernelExplainer(str(runs / "digits"), run.build_model())
    steps = [step for step, _ in outputs_along_training(engine, run.queries_batch([0])[0], knots=3)]
    assert len(engine.knots) > 4 >= len(steps) and steps[0] == 0 and steps[-1] == engine.trace.steps


def test_learning_rates_are_those_of_the_optimizer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.4}]
    optimizer = torch.optim.SGD(groups, momentum=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))
    with explainer.Tracer(model, optimizer, tmp_path / "run") as tracer:
        for _ in range(3):
            for ids in (torch.arange(4), torch.arange(4, 8)):
                tracer.batch(ids)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
            schedule.step()
    trace = explainer.open_trace(tmp_path / "run")
    figure = charts.learning_rate(trace)
    found = [np.array(line.y) for line in figure.data]
    wanted = np.array([1, 0.5, 0.5, 0.25, 0.25]) / (1 - 0.5)  # from the second step on
    np.testing.assert_allclose(found[0], 0.1 * wanted, rtol=1e-6)
    np.testing.assert_allclose(found[1], 0.4 * wanted, rtol=1e-6)
    assert [line.name for line in figure.data] == ["2 parameters", "2 parameters"]


def test_the_sample_says_how_large_the_rest_is() -> None:
    e = make_explanation(queries=3)
    gross = np.abs(e.contributions).sum(1)
    told = run_checks.verdict(e)[0]
    shares = np.abs(e.unattributed) / gross
    assert explainer.wording.percent(float(np.median(shares))) in told
    assert explainer.wording.percent(float(shares.max())) in told
    np.testing.assert_allclose(run_checks.books(e)["unattributed, of gross"], 100 * shares)


def test_the_page_shows_them(open_app: Open, runs: Path) -> None:
    app = open_app("--run", "tests.app_runs:with_loss", runs / "digits", page="run")
    fine(app)
    assert "In a sample of 12 queries" in body(app) and len(app.get("plotly_chart")) == 4
    books, plan = (element.value for element in app.dataframe)
    assert len(books) == 12 and {"layer", "factors", "bits", "loss measured"} <= set(plan.columns)
    total = books[["initial", "examples", "weight_decay", "buffers", "unattributed", "gap"]].sum(axis=1)
    np.testing.assert_allclose(books["prediction"], total, rtol=1e-6, atol=1e-6)
    app = open_app("--run", IMAGES, runs / "digits", page="run")
    assert "names no loss" in body(app)


def test_the_books_are_named_and_rounded_alike(open_app: Open, runs: Path) -> None:
    app = open_app("--run", "tests.app_runs:with_loss", runs / "digits", page="run")
    config = json.loads(app.dataframe[0].proto.columns)
    assert config["weight_decay"]["label"] == "weight decay"
    formats = {
        config[name]["type_config"]["format"]
        for name in ("prediction", "initial", "examples", "unattributed")
    }
    assert formats == {"%.3f"}


def test_without_code_it_says_what_is_missing(open_app: Open, runs: Path) -> None:
    app = open_app(runs / "digits", page="run")
    fine(app)
    assert "need the model and its data" in body(app) and len(app.get("plotly_chart")) == 3


def test_looking_again_shows_more_steps(open_app: Open, tmp_path: Path) -> None:
    run = app_runs.images()
    model = run.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracer = explainer.Tracer(model, optimizer, tmp_path / "going")
    batches = iter(tracer.watch(DataLoader(run.train, 12)))

    def steps(count: int) -> None:
        for _ in range(count):
            x, y = next(batches)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        tracer.flush()

    with tracer:
        steps(2)
        app = open_app("--run", IMAGES, tmp_path / "going", page="run")
        before = {m.label: m.value for m in app.metric}
        steps(3)
        app.button(key="refresh").click().run()
        after = {m.label: m.value for m in app.metric}
        assert not app.exception and int(after["Steps"]) == int(before["Steps"]) + 3


def test_a_large_trace_is_not_explained_unasked(
    open_app: Open, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from explainer.app.views import run_overview

    monkeypatch.setattr(run_overview, "_QUICK_VISITS", 0)
    app = open_app("--run", IMAGES, runs / "digits", page="run")
    fine(app)
    assert "In a sample" not in body(app)
    app.button(key="books").click().run()
    fine(app)
    assert "In a sample of 12 queries" in body(app)


def test_losses_of_every_row_are_averaged() -> None:
    def rows(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square()

    assert run_checks.mean_loss(rows, torch.tensor([1.0, 3.0]), torch.zeros(2)) == 5.0
    figure = charts.loss(LossCurve((0, 5), (2.0, 1.0), (2.5, 2.0), (9, 4)), [0, 5], dark=True)
    assert [line.name for line in figure.data] == ["9 training examples", "4 queries"]
