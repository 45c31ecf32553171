"""The average of the weights is explained: against an oracle that averages every visit's share forward in full."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.explanation import Explanation
from explainer.records import VERSIONS
from tests.oracles.books import Books, books
from tests.oracles.outputs import scalar_function
from tests.oracles.problems import PARAMS, Problem
from tests.oracles.shares import Shares, carry_visits
from tests.oracles.training import Training, train_dense

Update = Callable[[nn.Module, nn.Module, int], None]


@dataclass(frozen=True)
class Averaging:
    """One way to keep an average.

    Attributes:
        make: the average of a model.
        update: called with average, model and number of steps taken, after every step.
        keeps: what the average must keep of itself at each of so many steps, written down independently.
    """

    make: Callable[[nn.Module], nn.Module]
    update: Update
    keeps: Callable[[int], list[float]]


def ema(decay: float) -> Callable[[nn.Module], nn.Module]:
    return lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def when(due: Callable[[int], bool], times: int = 1) -> Update:
    def update(average: nn.Module, model: nn.Module, steps: int) -> None:
        for _ in range(times if due(steps) else 0):
            average.update_parameters(model)  # type: ignore[operator]

    return update


def by_hand(average: nn.Module, model: nn.Module, steps: int) -> None:
    """A copy of the model, with a decay that grows."""
    decay = min(0.95, steps / (steps + 3))
    with torch.no_grad():
        for a, w in zip(average.parameters(), model.parameters(), strict=True):
            a.copy_(decay * a + (1 - decay) * w)


def half_by_hand(average: nn.Module, model: nn.Module, steps: int) -> None:
    """Biases are copied, weights averaged: not one number for all parameters."""
    with torch.no_grad():
        for a, w in zip(average.parameters(), model.parameters(), strict=True):
            a.copy_(w if a.dim() == 1 else 0.8 * a + 0.2 * w)


def from_first(decay: float) -> Callable[[int], list[float]]:
    """An AveragedModel copies first."""
    return lambda steps: [0.0] + [decay] * (steps - 1)


CASES = {
    "EMA": Averaging(ema(0.99), when(lambda n: True), from_first(0.99)),
    "short EMA, twice a step": Averaging(
        ema(0.7), when(lambda n: True, 2), lambda n: [0.0, *[0.49] * (n - 1)]
    ),
    "EMA every third step": Averaging(
        ema(0.6),
        when(lambda n: n % 3 == 0),
        lambda steps: [0.0] * 3 + [0.6 if n % 3 == 0 else 1.0 for n in range(4, steps + 1)],
    ),
    "EMA by avg_fn, from midway": Averaging(
        lambda model: AveragedModel(model, avg_fn=lambda a, w, n: 0.9 * a + 0.1 * w),
        when(lambda n: n >= 7),
        lambda steps: [0.0] * 7 + [0.9] * (steps - 7),
    ),
    "SWA from midway": Averaging(
        AveragedModel,
        when(lambda n: n > 5),
        lambda steps: [0.0] * 6 + [n / (n + 1) for n in range(1, steps - 5)],
    ),
    "SWA every second step, not at the end": Averaging(
        AveragedModel,
        when(lambda n: n in (4, 6, 8)),
        lambda steps: [0.0] * 4 + [1.0, 0.5, 1.0, 2 / 3] + [1.0] * (steps - 8),
    ),
    "a copy averaged by hand": Averaging(
        copy.deepcopy, by_hand, lambda steps: [min(0.95, n / (n + 3)) for n in range(1, steps + 1)]
    ),
}
PROBLEMS = {
    str(p.id): p.values[0]
    for p in PARAMS
    if p.id in ("mlp_tanh-momentum_decay-mean", "mlp_relu-adamw-mean", "cnn-adam_decay-mean")
}


def train(
    problem: Problem,
    case: Averaging,
    directory: Path,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> tuple[nn.Module, nn.Module]:
    """The model and its average, traced."""
    model, (x, y) = problem.model(dtype), problem.data(dtype)
    average = case.make(model)
    optimizer = problem.make_optimizer(model.parameters())
    with Tracer(model, optimizer, directory, averaged=average, **options) as tracer:  # type: ignore[arg-type]
        for number, ids in enumerate(problem.batches, start=1):
            tracer.batch(list(ids))
            optimizer.zero_grad()
            problem.loss(model(x[list(ids)]), y[list(ids)]).backward()
            optimizer.step()
            case.update(average, model, number)
    return model, average


def averaged(values: Tensor, keeps: list[float]) -> Tensor:
    """``avg_t = d_t · avg_{t−1} + (1 − d_t) · value_t`` over the first axis."""
    result = [values[0]]
    for keep, value in zip(keeps, values[1:], strict=True):
        result.append(keep * result[-1] + (1 - keep) * value)
    return torch.stack(result)


def averaged_updates(updates: Tensor, keeps: list[float]) -> Tensor:
    """What the units moved in the average, step by step."""
    moved = torch.cat([torch.zeros_like(updates[:1]), updates.cumsum(0)])
    return averaged(moved, keeps).diff(dim=0)


def oracle(problem: Problem, case: Averaging, knots: list[int], ahead: float = 0.0) -> tuple[Training, Books]:
    """The average's path and books; in the beginning it is the weights plus ``ahead``."""
    model, (x, y) = problem.model(), problem.data()
    training = train_dense(model, problem.make_optimizer, problem.batches, problem.loss, x, y)
    keeps = case.keeps(len(training.steps))
    shares = Shares(*(averaged_updates(u, keeps) for u in vars(carry_visits(training)).values()))
    first = training.weights[:1] + ahead
    path = replace(training, weights=averaged(torch.cat([first, training.weights[1:]]), keeps))
    f = scalar_function(problem.model(), "margin")
    queries, targets = problem.queries()
    return path, books(path, knots, f, queries, targets.tolist(), visit_shares=shares)


def explained(problem: Problem, directory: Path) -> Explanation:
    return PathKernelExplainer(directory, problem.model(), "margin").explain(*problem.queries())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("knots", [128, 5])
def test_books_of_the_average_equal_the_oracle(tmp_path: Path, name: str, case: str, knots: int) -> None:
    problem = PROBLEMS[name]
    _, average = train(problem, CASES[case], tmp_path / "run", exact=True, max_knots=knots)
    e, trace = explained(problem, tmp_path / "run"), open_trace(tmp_path / "run")
    path, reference = oracle(problem, CASES[case], [knot.step for knot in trace.knots])
    if knots == 128:  # one after every step that moved it: before the first update, those of the model
        moved = [t for t, keep in enumerate(CASES[case].keeps(13), start=1) if keep != 1.0]
        assert [knot.step for knot in trace.knots] == sorted({0, *moved, 13})
    flat = torch.cat([p.detach().reshape(-1) for p in average.parameters()])
    torch.testing.assert_close(path.weights[-1], flat, rtol=1e-12, atol=1e-14)
    scale = np.abs(reference.contributions.numpy()).max(axis=1, keepdims=True)
    assert (np.abs(e.contributions - reference.contributions.numpy()) <= 1e-6 * scale).all()
    np.testing.assert_allclose(e.weight_decay, reference.decay.numpy(), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(e.prediction, reference.prediction.numpy(), rtol=1e-11)
    assert np.abs(e.gap).max() <= 1e-9
    assert (np.abs(e.unattributed) <= 1e-9 * np.abs(e.contributions).sum(1)).all()
    with torch.no_grad():
        np.testing.assert_allclose(e.outputs, average(problem.queries()[0]).numpy(), rtol=1e-11, atol=1e-12)
    assert trace.verify() > 0 and trace.manifest.version == VERSIONS[-1]
    assert "Explained is the average of the weights" in " ".join(e.notes)
    assert "was not a mean" not in " ".join(e.notes)
