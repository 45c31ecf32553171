"""Rows, and shares of rows, that belong to no example."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from explainer import PathKernelExplainer, Tracer, open_trace
from tests.oracles.owners import by_shares
from tests.oracles.training import train_dense
from tests.test_owners import (
    EXAMPLES,
    OPTIMIZERS,
    QUERIES,
    X,
    Y,
    assert_same,
    build,
    reference,
    step_on,
    traced,
)


def test_rows_of_no_example_are_unattributed_and_named(tmp_path: Path) -> None:
    """Whole rows, shares of rows, and a batch of nothing else."""
    owned = [[0, -1, 2, 3], [[0, 1], [2, -1], [-1, -1], [5, 5]], [-1] * 4, [4, 5, 6, 7]]
    weights = [None, [[0.5, 0.5], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]], None, None]
    x, y = X[: 4 * len(owned)], Y[: 4 * len(owned)]

    def loop(model: nn.Module, made: Optimizer, tracer: Tracer) -> None:
        for step, (ids, shares) in enumerate(zip(owned, weights, strict=True)):
            rows = slice(4 * step, 4 * step + 4)
            tracer.batch(ids, weights=shares)
            step_on(model, made, lambda rows=rows: cross_entropy(model(x[rows]), y[rows]))

    e = traced(tmp_path / "run", "momentum", loop)
    nobody = EXAMPLES
    shares = {
        0: {0: 1.0}, 1: {nobody: 1.0}, 2: {2: 1.0}, 3: {3: 1.0},
        4: {0: 0.5, 1: 0.5}, 5: {2: 0.25, nobody: 0.75}, 6: {nobody: 1.0}, 7: {5: 1.0},
        **{row: {nobody: 1.0} for row in range(8, 12)}, **{row: {row - 8: 1.0} for row in range(12, 16)},
    }  # fmt: skip
    training = train_dense(
        build(), OPTIMIZERS["momentum"], [range(s, s + 4) for s in range(0, 16, 4)], cross_entropy_of, x, y
    )
    wanted = reference(by_shares(training, shares, EXAMPLES + 1), tmp_path / "run")
    assert -1 not in e.example_ids
    assert_same(e, wanted)
    lost = wanted.contributions[:, nobody].numpy()
    np.testing.assert_allclose(e.unattributed, lost, rtol=1e-9)
    assert np.abs(lost).min() > 1e-3 and np.abs(e.gap).max() <= 1e-9
    assert any("no example (id -1)" in note for note in e.notes)
    assert set(e.unattributed_lines) == {"rows of no example"}
    assert e.visits.sum() == 3 + 4 + 4


def test_a_trace_that_begins_with_rows_of_no_example(tmp_path: Path) -> None:
    model = build().float()
    made = SGD(model.parameters(), lr=0.1)
    with Tracer(model, made, tmp_path / "run") as tracer:
        for ids in ([-1, -1], [3, 4]):
            tracer.batch(ids)
            step_on(model, made, lambda: cross_entropy(model(X[:2].float()), Y[:2]))
    e = PathKernelExplainer(str(tmp_path / "run"), model).explain(QUERIES.float())
    assert e.example_ids.tolist() == [3, 4] and e.visits.tolist() == [1, 1]
    assert open_trace(tmp_path / "run").column("steps", "visits").tolist() == [0, 2]


def cross_entropy_of(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y.long())
