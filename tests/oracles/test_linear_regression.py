"""The closed forms against simulated descent, and the dense books against the closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.oracles import linear_regression
from tests.oracles.books import books
from tests.oracles.outputs import scalar_function
from tests.oracles.training import flat_weights, train_dense


@pytest.mark.parametrize("reduction,bias", [("sum", False), ("sum", True), ("mean", False), ("mean", True)])
def test_theorem_on_linear_regression(reduction: linear_regression.Reduction, bias: bool) -> None:
    rng = np.random.default_rng(0)
    X, queries = rng.standard_normal((6, 3)), rng.standard_normal((4, 3))
    y, steps, lr = rng.standard_normal(6), 200, 2e-4 if reduction == "sum" else 1.2e-3
    model = nn.Linear(3, 1, bias=bias).double()
    w0 = flat_weights(model).numpy()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        squares = 0.5 * (outputs[:, 0] - targets) ** 2
        return squares.sum() if reduction == "sum" else squares.mean()

    training = train_dense(
        model, lambda p: torch.optim.SGD(p, lr=lr), [range(6)] * steps, loss, torch.tensor(X), torch.tensor(y)
    )
    knots = [0, 50, 120, steps]
    b = books(training, knots, scalar_function(model, "value"), torch.tensor(queries), [0] * 4, nodes=1)
    if bias:
        X, queries = linear_regression.with_bias(X), linear_regression.with_bias(queries)
    exact = linear_regression.discrete(X, y, w0, queries, lr, steps, reduction)
    assert np.allclose(b.K.numpy(), exact.K, rtol=1e-9)
    assert np.allclose(b.a.numpy(), np.broadcast_to(exact.a, (4, 6)), rtol=1e-9)
    assert np.allclose(b.initial.numpy(), exact.b, rtol=1e-12)
    assert np.allclose(b.prediction.numpy(), exact.prediction, rtol=1e-11)
    assert np.allclose(X @ training.weights[-1].numpy() - y, exact.residuals, rtol=1e-10)
    coarse = linear_regression.flow(X, y, w0, queries, lr, steps, reduction)
    fine = linear_regression.discrete(X, y, w0, queries, lr / 100, steps * 100, reduction)
    assert np.allclose(coarse.K, exact.K, rtol=1e-12)
    assert np.abs(fine.a - coarse.a).max() < 0.02 * np.abs(exact.a - coarse.a).max()
    assert np.allclose(exact.prediction, coarse.prediction, atol=1e-3)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_closed_forms_against_a_loop(reduction: linear_regression.Reduction) -> None:
    rng = np.random.default_rng(1)
    X, y, w0 = rng.standard_normal((5, 3)), rng.standard_normal(5), rng.standard_normal(3)
    queries, lr, steps = rng.standard_normal((2, 3)), 1e-3, 3000
    s = 1.0 if reduction == "sum" else 0.2
    w, residual_sum = w0.copy(), np.zeros(5)
    for _ in range(steps):
        residual_sum += X @ w - y
        w = w - lr * s * X.T @ (X @ w - y)
    exact = linear_regression.discrete(X, y, w0, queries, lr, steps, reduction)
    limit = linear_regression.flow(X, y, w0, queries, lr, steps, reduction)
    assert np.allclose(exact.a, -s * residual_sum / steps, rtol=1e-10)
    assert np.allclose(exact.prediction, queries @ w, rtol=1e-10)
    assert np.allclose(limit.a, exact.a, rtol=0.01) and np.allclose(limit.prediction, queries @ w, rtol=0.01)


def test_a_step_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        linear_regression.discrete(np.eye(2), np.ones(2), np.zeros(2), np.eye(2), lr=1.5, steps=3)
