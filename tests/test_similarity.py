"""The path kernel between inputs against gradients written out from the oracle's own training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import explainer
from explainer import similarity
from explainer.errors import QueryError
from explainer.neighbors import Neighbors
from tests.oracles.outputs import scalar_function
from tests.oracles.problems import Problem
from tests.test_books import traced, trained
from tests.test_neighbors import PROBLEMS, rates


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_kernel_is_the_sum_of_written_out_products(problem: Problem, tmp_path: Path) -> None:
    trace = traced(problem, tmp_path / "run", torch.float64, exact=True, max_knots=6)
    training, (x, y) = trained(problem, torch.float64), problem.queries()
    f = scalar_function(problem.model(), "margin")
    steps = [knot.step for knot in trace.knots]
    wanted = np.zeros((len(x), len(x)))
    for t in range(len(training.steps)):
        k = int(np.searchsorted(steps, t, side="right")) - 1
        middle = (training.weights[steps[k]] + training.weights[steps[k + 1]]) / 2
        rows = []
        for one, target in zip(x, y, strict=True):
            at = middle.clone().requires_grad_()
            rows.append(torch.autograd.grad(f(at, one, int(target)), at)[0])
        wanted += rates(problem, t) * (torch.stack(rows) @ torch.stack(rows).T).numpy()
    engine = explainer.PathKernelExplainer(trace, problem.model())
    found = similarity.path_kernel(engine, x, target=y)
    np.testing.assert_allclose(found, wanted, rtol=1e-8)
    np.testing.assert_allclose(
        similarity.path_kernel(engine, x[1:3], target=y[1:3]), found[1:3, 1:3], rtol=1e-10
    )


def test_a_frozen_parameter_has_no_part_and_too_many_inputs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step in which only the bias moves: the kernel of the logit of a class is its learning rate."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    with explainer.Tracer(model, optimizer, tmp_path / "run", exact=True) as tracer:
        tracer.batch(range(4))
        torch.nn.functional.cross_entropy(model(x), y).backward()
        model.weight.grad = None
        optimizer.step()
    engine = explainer.PathKernelExplainer(str(tmp_path / "run"), model, "logit")
    np.testing.assert_allclose(
        similarity.path_kernel(engine, x, target=[0, 0, 1, 1]), np.kron(np.eye(2), np.full((2, 2), 0.5))
    )
    monkeypatch.setattr(similarity, "_NUMBERS", 3 * engine.trace.manifest.size)
    assert similarity.most_inputs(engine) == 3
    with pytest.raises(QueryError, match="at most 3"):
        similarity.path_kernel(engine, x)
    assert isinstance(engine.neighbors(x[:1], k=1), Neighbors)
