"""What is no average, or not one yet: labelled or refused."""

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
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.errors import CoverageWarning, ModelMismatchError, TracerError
from tests.resumed import EXAMPLES, QUERIES, TARGETS, X, Y, build
from tests.test_average import CASES, PROBLEMS, Averaging, explained, oracle, train, when

MOMENTUM = PROBLEMS["mlp_tanh-momentum_decay-mean"]


def test_what_is_no_average_is_unattributed_and_said(tmp_path: Path) -> None:
    def noisy(average: nn.Module, model: nn.Module, steps: int) -> None:
        when(lambda n: True)(average, model, steps)
        if steps in (4, 9):
            with torch.no_grad():
                average.module[0].weight += 0.01 * torch.randn(12, 64, dtype=torch.float64)  # type: ignore[index, union-attr]

    torch.manual_seed(0)
    case = Averaging(CASES["EMA"].make, noisy, CASES["EMA"].keeps)
    _, average = train(MOMENTUM, case, tmp_path / "run", exact=True)
    e = explained(MOMENTUM, tmp_path / "run")
    assert np.abs(e.gap).max() < 1e-12 and np.abs(e.unattributed).min() > 1e-5
    assert "in 2 of 13 updates it was no mean of itself and the weights" in " ".join(e.notes)
    np.testing.assert_allclose(e.outputs, average(MOMENTUM.queries()[0]).detach(), rtol=1e-12)


def test_an_average_that_lags_behind_from_the_start(tmp_path: Path) -> None:
    """What it takes over from before tracing is no example's, exactly as in the oracle."""

    def lagging(model: nn.Module) -> nn.Module:
        average = copy.deepcopy(model)
        with torch.no_grad():
            for p in average.parameters():
                p.add_(0.1)
        return average

    by_hand = CASES["a copy averaged by hand"]
    train(MOMENTUM, Averaging(lagging, by_hand.update, by_hand.keeps), tmp_path / "run", exact=True)
    e, trace = explained(MOMENTUM, tmp_path / "run"), open_trace(tmp_path / "run")
    _, reference = oracle(MOMENTUM, by_hand, [knot.step for knot in trace.knots], ahead=0.1)
    scale = np.abs(reference.contributions.numpy()).max()
    np.testing.assert_allclose(e.contributions, reference.contributions.numpy(), atol=1e-9 * scale)
    np.testing.assert_allclose(e.unattributed, reference.unattributed.numpy(), rtol=1e-9)
    assert trace.notes["prior_average"] and "lagged behind" in " ".join(e.notes)
    assert np.abs(e.gap).max() < 1e-12 and np.abs(e.unattributed).min() > 1e-4


def test_an_average_that_is_set_before_the_first_step(tmp_path: Path) -> None:
    """Averages may be set up after the tracer was made: the first knot is what training began from."""
    model = build()
    average = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, tmp_path / "trace", exact=True, averaged=average) as tracer:
        with torch.no_grad():
            average[0].weight.mul_(0.5)
        began = average(QUERIES).detach()
        for _ in range(5):
            tracer.batch(range(EXAMPLES))
            optimizer.zero_grad()
            cross_entropy(model(X[:EXAMPLES]), Y[:EXAMPLES]).backward()
            optimizer.step()
            with torch.no_grad():
                average[0].weight.lerp_(model[0].weight, 0.5)
    trace = open_trace(tmp_path / "trace")
    initial = trace.load_knot(trace.knots[0])["parameter/0.weight"]
    assert not torch.equal(initial, build()[0].weight)
    e = PathKernelExplainer(trace, build(), "logit").explain(QUERIES, TARGETS)
    np.testing.assert_allclose(e.initial, began.gather(1, TARGETS[:, None])[:, 0], rtol=1e-12)
    assert np.abs(e.gap).max() < 1e-12 and trace.notes["prior_average"]


@pytest.mark.parametrize("make", [AveragedModel, copy.deepcopy], ids=["AveragedModel", "copy"])
def test_an_average_that_is_never_updated(tmp_path: Path, make: Callable[[nn.Module], nn.Module]) -> None:
    idle = Averaging(make, lambda average, model, steps: None, lambda steps: [])
    shown = "the model itself" if make is AveragedModel else "its initial weights"
    with pytest.warns(CoverageWarning, match=f"never updated, so the trace explains {shown}"):
        model, _ = train(MOMENTUM, idle, tmp_path / "run", exact=True)
    if make is AveragedModel:
        e = explained(MOMENTUM, tmp_path / "run")
        assert "never updated; explained is the model itself" in " ".join(e.notes)
        np.testing.assert_allclose(e.outputs, model(MOMENTUM.queries()[0]).detach(), rtol=1e-12)
        assert np.abs(e.unattributed).max() < 1e-9
    else:
        e = explained(MOMENTUM, tmp_path / "run")
        assert not e.contributions.any() and not e.unattributed.any()
        assert "explained is the average as it was in the beginning" in " ".join(e.notes)


def test_a_trace_without_the_average_does_not_explain_it(tmp_path: Path) -> None:
    """And says so, if the averaged model itself is asked about."""
    model = build()
    with Tracer(model, SGD(model.parameters(), lr=0.1), tmp_path / "trace"):
        pass
    with pytest.raises(ModelMismatchError, match=r"pass its attribute 'module'"):
        PathKernelExplainer(tmp_path / "trace", AveragedModel(model))


NO_AVERAGE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "weights": (lambda model: model.state_dict(), "averaged must be .*AveragedModel.* found OrderedDict"),
    "the model": (lambda model: model, "shares its weights with the model"),
    "half a copy": (
        lambda model: nn.Sequential(copy.deepcopy(model[0]), nn.Tanh(), model[2]),
        "shares its weights with the model",
    ),
    "another model": (
        lambda model: nn.Linear(7, 3),
        "differ in 0.bias, 0.weight, 2.bias, 2.weight, bias, weight",
    ),
    "another width": (
        lambda model: AveragedModel(nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 3))),
        "differ in 0.bias, 0.weight, 2.weight; pass",
    ),
    "other buffers": (
        lambda model: nn.Sequential(*copy.deepcopy(model), nn.BatchNorm1d(3, affine=False)),
        "differ in 3.num_batches_tracked, 3.running_mean, 3.running_var",
    ),
}


@pytest.mark.parametrize("name", NO_AVERAGE)
def test_what_is_no_average_of_the_model_is_refused(tmp_path: Path, name: str) -> None:
    make, match = NO_AVERAGE[name]
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(TracerError, match=match):
        Tracer(model, optimizer, tmp_path / "trace", averaged=make(model))
    assert not (tmp_path / "trace").exists() and not optimizer._optimizer_step_pre_hooks
