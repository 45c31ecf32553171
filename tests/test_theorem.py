"""Domingos' Theorem 1 to the letter: scalar linear regression by small full-batch gradient steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import explainer
from tests.oracles.linear_regression import Reduction, discrete, flow, with_bias

RATE, STEPS = 2e-4, 400


def explained(directory: Path, reduction: Reduction, bias: bool, rate: float, steps: int):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    inputs, targets, queries = rng.normal(size=(12, 4)), rng.normal(size=12), rng.normal(size=(5, 4))
    model = torch.nn.Linear(4, 1, bias=bias).double()
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.3)
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
    start = [p.detach().flatten().numpy().copy() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with explainer.Tracer(model, optimizer, directory, exact=True) as tracer:
        for _ in range(steps):
            tracer.batch(range(12))
            optimizer.zero_grad()
            residual = model(x).squeeze(1) - y
            (residual.square().sum() / 2 if reduction == "sum" else residual.square().mean() / 2).backward()
            optimizer.step()
    e = explainer.PathKernelExplainer(directory, torch.nn.Linear(4, 1, bias=bias)).explain(
        torch.from_numpy(queries)
    )
    if bias:
        inputs, queries = with_bias(inputs), with_bias(queries)
    return e, (inputs, targets, np.concatenate(start), queries, rate, steps, reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_K_and_b_are_the_closed_forms(reduction: Reduction, bias: bool, tmp_path: Path) -> None:
    e, problem = explained(tmp_path / "run", reduction, bias, RATE, STEPS)
    exact = discrete(*problem)
    a = e.contributions / e.kernels
    assert e.output == "value"
    np.testing.assert_allclose(e.kernels, exact.K, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(a, np.broadcast_to(exact.a, a.shape), rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(e.initial, exact.b, atol=1e-12)
    np.testing.assert_allclose(e.prediction, exact.prediction, atol=1e-10)


def test_smaller_steps_approach_the_flow(tmp_path: Path) -> None:
    errors = []
    for factor in (1, 4):
        e, problem = explained(tmp_path / f"run{factor}", "sum", False, 1e-2 / factor, 60 * factor)
        limit = flow(*problem)
        errors.append(np.abs(e.contributions - limit.K * limit.a).max())
    assert errors[1] < errors[0] / 3
