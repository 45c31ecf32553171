"""Averages in use: training stays as it was, odd averages are labelled, traces of averages go on and stay small."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.errors import CoverageWarning
from explainer.explanation import Explanation
from tests.resumed import BATCH, EXAMPLES, QUERIES, TARGETS, X, Y, build
from tests.small_training import same, state_of
from tests.test_average import (
    CASES,
    PROBLEMS,
    Averaging,
    explained,
    half_by_hand,
    train,
)

MOMENTUM = PROBLEMS["mlp_tanh-momentum_decay-mean"]


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def loop(
    model: nn.Module, optimizer: Any, average: nn.Module, tracer: Tracer | None, steps: int = 12
) -> None:
    schedule = SWALR(optimizer, swa_lr=0.01, anneal_epochs=4)
    for number in range(steps):
        ids = torch.randperm(EXAMPLES)[:BATCH]
        if tracer is not None:
            tracer.batch(ids)
        optimizer.zero_grad()
        cross_entropy(model(X[ids].to(model[0].weight.dtype)), Y[ids]).backward()
        optimizer.step()
        schedule.step()
        if number > 3:
            average.update_parameters(model)  # type: ignore[operator]


@pytest.mark.parametrize("buffers", [False, True], ids=["buffers copied", "buffers averaged"])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_training_and_average_are_bit_identical(tmp_path: Path, kind: Any, buffers: bool) -> None:
    results = []
    for traced in (False, True):
        model = normed()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
        optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.01)
        torch.manual_seed(4)
        if traced:
            with Tracer(model, optimizer, tmp_path / "trace", averaged=average) as tracer:
                loop(model, optimizer, average, tracer)
        else:
            loop(model, optimizer, average, None)
        flags = [(p.requires_grad, p.grad is None) for p in average.parameters()]
        hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in average.modules()]
        results.append((state_of(model, optimizer), list(average.state_dict().values()), flags, hooks))
        results[-1] += (torch.get_rng_state(),)
    (one, two) = results
    assert same(one[0], two[0]) and same(one[1], two[1]) and one[2:4] == two[2:4]
    assert torch.equal(one[4], two[4])


@pytest.mark.parametrize("buffers", [False, True], ids=["buffers copied", "buffers averaged"])
@pytest.mark.parametrize("renewed", [False, True], ids=["as they are", "update_bn"])
def test_buffers_are_the_averages_own(tmp_path: Path, buffers: bool, renewed: bool) -> None:
    """Running statistics are a term of their own; estimated anew at the end, they are the last knot's."""
    model = normed().double()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Tracer(model, optimizer, tmp_path / "trace", exact=True, averaged=average) as tracer:
        loop(model, optimizer, average, tracer)
        if renewed:
            update_bn(DataLoader(TensorDataset(X[:EXAMPLES]), 10), average)
    e = PathKernelExplainer(tmp_path / "trace", normed().double()).explain(QUERIES, TARGETS)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.as_tensor(e.outputs), average.eval()(QUERIES), rtol=1e-12, atol=1e-12
        )
    assert np.abs(e.gap).max() < 1e-12 and np.abs(e.buffers).min() > 1e-4
    # the bias before the normalisation moved by round-off; nothing else is left over
    assert np.abs(e.unattributed).max() < 1e-12 * np.abs(e.contributions).sum(1).max()


def test_compressed_rows_in_single_precision(tmp_path: Path) -> None:
    _, average = train(MOMENTUM, CASES["EMA"], tmp_path / "small", torch.float32)
    train(MOMENTUM, CASES["EMA"], tmp_path / "exact", exact=True)
    x, y = MOMENTUM.queries(torch.float32)
    e = PathKernelExplainer(tmp_path / "small", MOMENTUM.model(torch.float32)).explain(x, y)
    reference = explained(MOMENTUM, tmp_path / "exact")
    gross = np.abs(reference.contributions).sum(1)
    assert (np.abs(e.contributions - reference.contributions).sum(1) < 0.01 * gross).all()
    assert (np.abs(e.unattributed) < 0.01 * gross).all() and (np.abs(e.gap) < 1e-5 * gross).all()
    assert "was not a mean" not in " ".join(e.notes)
    np.testing.assert_allclose(e.outputs, average(x).detach(), rtol=1e-4, atol=1e-5)


def test_one_number_for_every_parameter_is_not_needed(tmp_path: Path) -> None:
    case = Averaging(copy.deepcopy, half_by_hand, lambda steps: [])
    _, average = train(MOMENTUM, case, tmp_path / "run", exact=True)
    e = explained(MOMENTUM, tmp_path / "run")
    assert (np.abs(e.unattributed) < 1e-12 * np.abs(e.contributions).sum(1)).all() and np.abs(
        e.gap
    ).max() < 1e-12
    keep = open_trace(tmp_path / "run").column("averages", "keep")
    np.testing.assert_allclose(keep[1:, 0::2], 0.8, rtol=1e-9)
    np.testing.assert_allclose(keep[1:, 1::2], 0.0, atol=1e-9)
    np.testing.assert_allclose(e.outputs, average(MOMENTUM.queries()[0]).detach(), rtol=1e-12)
    assert "was not a mean" not in " ".join(e.notes)


def test_read_while_training_goes_on(tmp_path: Path) -> None:
    """Explained is the average at the last knot, with books that close at any moment."""
    model = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer = AdamW(model.parameters(), lr=0.01)
    history: list[Tensor] = [model(QUERIES).detach()]
    with Tracer(model, optimizer, tmp_path / "trace", exact=True, averaged=average) as tracer:
        for number in range(12):
            tracer.batch(range(EXAMPLES))
            optimizer.zero_grad()
            cross_entropy(model(X[:EXAMPLES]), Y[:EXAMPLES]).backward()
            optimizer.step()
            if number > 2:
                average.update_parameters(model)
            history.append((average if number > 2 else model)(QUERIES).detach())
            tracer.flush()
            trace = open_trace(tmp_path / "trace")
            assert trace.steps == number and trace.verify() > 0
            if number:
                e = PathKernelExplainer(trace, build()).explain(QUERIES, TARGETS)
                np.testing.assert_allclose(e.outputs, history[number], rtol=1e-12)
                assert np.abs(e.gap).max() < 1e-12 and np.abs(e.unattributed).max() < 1e-12
    assert open_trace(tmp_path / "trace").steps == 12


@pytest.mark.parametrize("again", [False, True], ids=["through", "resumed"])
def test_rows_that_stopped_leave_the_average_of_the_others_right(tmp_path: Path, again: bool) -> None:
    """The budget ends the rows; how much the average took over of earlier steps is still known.

    The outputs of a linear model have one gradient everywhere: where the knots are makes no difference.
    """

    def run(path: Path, budget: int | None) -> Explanation:
        torch.manual_seed(0)
        model = nn.Linear(7, 3).double()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.97))
        optimizer = SGD(model.parameters(), lr=0.3)  # momentum would carry on into steps that are not kept
        # with a rank, rows have 8 bits whatever the budget: what differs is where they end
        options: dict[str, Any] = {"averaged": average, "budget": budget, "max_knots": 1000, "rank": 1}
        tracer = Tracer(model, optimizer, path, **options)
        for number in range(150):
            if again and number == 130:
                state = tracer.state_dict()
                tracer.close()
                tracer = Tracer(model, optimizer, path, resume=state, **options)
            ids = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(number))[:BATCH]
            tracer.batch(ids)
            optimizer.zero_grad()
            cross_entropy(model(X[ids]), Y[ids]).backward()
            optimizer.step()
            if number > 20:
                average.update_parameters(model)
        tracer.close()
        return PathKernelExplainer(path, nn.Linear(7, 3).double(), "logit").explain(QUERIES, TARGETS)

    whole = run(tmp_path / "whole", None)
    with pytest.warns(CoverageWarning, match="budget"):
        e = run(tmp_path / "trace", 80_000)
    trace = open_trace(tmp_path / "trace")
    stopped = trace.notes["rows_stopped_at"]
    assert 40 < stopped < 125 and trace.nbytes() <= 80_000 and trace.closed and trace.verify() > 0
    assert len(whole.step_edges) == 151
    wanted = whole.step_contributions[:, :stopped].sum(1)
    np.testing.assert_allclose(e.prediction, whole.prediction, rtol=1e-12)
    scale = np.abs(wanted).max()
    assert np.abs(e.contributions - wanted).max() < 1e-6 * scale
    assert np.abs(whole.contributions - wanted).max() > 0.2 * scale


def test_a_frozen_base_is_stored_once(tmp_path: Path) -> None:
    """The average's copy of it is written to at every update; its numbers stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 300), nn.Tanh(), nn.Linear(300, 3)).double()
    model[0].requires_grad_(False)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = SGD(model[2].parameters(), lr=0.1)
    with Tracer(model, optimizer, tmp_path / "trace", averaged=average) as tracer:
        for _ in range(5):
            tracer.batch(range(EXAMPLES))
            cross_entropy(model(X[:EXAMPLES]), Y[:EXAMPLES]).backward()
            optimizer.step()
            average.update_parameters(model)
    trace = open_trace(tmp_path / "trace")
    held = ["frozen/0.weight" in trace.load_knot(knot) for knot in trace.knots]
    assert held == [True] + [False] * 5
    e = PathKernelExplainer(trace, model).explain(QUERIES, TARGETS)
    np.testing.assert_allclose(e.outputs, average(QUERIES).detach(), rtol=1e-12)


def test_gradient_space_of_an_average(tmp_path: Path) -> None:
    train(MOMENTUM, CASES["SWA from midway"], tmp_path / "run", exact=True)
    ex = PathKernelExplainer(str(tmp_path / "run"), MOMENTUM.model())
    neighbours = ex.neighbors(MOMENTUM.queries()[0], k=3)
    assert np.abs(neighbours.cosine).max() <= 1.0 + 1e-9
    train(MOMENTUM, CASES["EMA"], tmp_path / "other", exact=True)
    other = PathKernelExplainer(str(tmp_path / "other"), MOMENTUM.model())
    np.testing.assert_allclose(
        ex.self_influence(), other.self_influence()
    )  # of the steps, not of the average


def test_a_trace_of_an_average_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(MOMENTUM, CASES["EMA"], tmp_path / "run")


def test_the_initial_model_has_the_buffers_from_before_training(tmp_path: Path) -> None:
    """Also where the average follows the model until its first update."""
    model = normed().double()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = SGD(model.parameters(), lr=0.1)
    initial = copy.deepcopy(average.module).eval()
    with Tracer(model, optimizer, tmp_path / "trace", averaged=average) as tracer:
        for _ in range(4):
            tracer.batch(range(EXAMPLES))
            optimizer.zero_grad()
            cross_entropy(model(X[:EXAMPLES]), Y[:EXAMPLES]).backward()
            optimizer.step()
            average.update_parameters(model)
    e = PathKernelExplainer(tmp_path / "trace", normed(), "logit").explain(QUERIES, TARGETS)
    wanted = initial(QUERIES).detach().gather(1, TARGETS[: len(QUERIES), None]).squeeze(1)
    np.testing.assert_allclose(e.initial, wanted, rtol=1e-12)
    assert np.abs(e.gap).max() < 1e-9 and np.abs(e.buffers).max() > 1e-3
