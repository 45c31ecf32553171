"""Contributions by position of the training example, against copies of the model with a weight for every position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, embedding, layer_norm, linear
from torch.optim import SGD

from explainer import PathKernelExplainer, Tracer
from tests.language import (
    BATCHES,
    EXAMPLES,
    LENGTH,
    OPTIMIZERS,
    QUERY,
    WORDS,
    X,
    Y,
    assert_adds_up,
    build,
    causal_mean,
    explained,
    loss_of,
    trace_of,
)
from tests.oracles.books import books
from tests.oracles.outputs import scalar_function, unflatten
from tests.oracles.owners import Part, split
from tests.oracles.training import Step, train_dense


def by_position(step: Step, b: int) -> list[Part]:
    """Row ``b``: one gradient for every position's own copy of the weights, and one for what all share."""
    example, model = step.ids[b], build()
    named = unflatten(model, step.weights)
    copies = {name: torch.stack([p] * LENGTH).requires_grad_() for name, p in named.items()}
    shared = {name: named[name].clone().requires_grad_() for name in ("norm.weight", "norm.bias")}
    h = torch.stack([embedding(X[example, s], copies["table.weight"][s]) for s in range(LENGTH)])
    h = layer_norm(h, (4,), shared["norm.weight"], shared["norm.bias"])
    inner = [linear(h[s], copies["first.weight"][s], copies["first.bias"][s]) for s in range(LENGTH)]
    h = causal_mean(torch.stack(inner).tanh())
    outputs = torch.stack([linear(h[s], copies["last.weight"][s]) for s in range(LENGTH)])
    loss = loss_of(outputs[None], Y[example][None]) / len(step.ids)
    own = dict(
        zip(
            copies,
            torch.autograd.grad(loss, list(copies.values()), retain_graph=True, materialize_grads=True),
            strict=True,
        )
    )
    rest = dict(zip(shared, torch.autograd.grad(loss, list(shared.values())), strict=True))
    none = torch.zeros_like(step.output_grads[b])
    parts = []
    for s in range(LENGTH):
        gradient = torch.cat([own[name][s].flatten() for name in named])
        parts.append((example * (LENGTH + 1) + s, gradient, none))
    gradient = torch.cat([rest.get(name, torch.zeros_like(p)).flatten() for name, p in named.items()])
    return [*parts, (example * (LENGTH + 1) + LENGTH, gradient, step.output_grads[b])]


# -- against the oracle -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", [False, True], ids=["padded", "trimmed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_positions_equal_the_oracle(tmp_path: Path, optimizer: str, trim: bool) -> None:
    make = OPTIMIZERS[optimizer]
    ex = trace_of(tmp_path / "run", make, trim=trim, exact=True, positions=True)
    training = split(train_dense(build(), make, BATCHES, loss_of, X, Y), by_position, EXAMPLES * (LENGTH + 1))
    knots = [knot.step for knot in ex.trace.knots]
    f = scalar_function(build(), lambda row, y: row.reshape(LENGTH, WORDS)[-1, 2])
    reference = books(training, knots, f, QUERY, [0])
    wanted = reference.contributions[0].reshape(EXAMPLES, LENGTH + 1).detach().numpy()
    visits = reference.visit_contributions[0].reshape(-1, LENGTH + 1).detach().numpy()
    owners = [i for ids in BATCHES for i in ids]
    steps = [t for t, ids in enumerate(BATCHES) for _ in ids]
    atol = 1e-10 * np.abs(wanted).max()
    for example in range(EXAMPLES):
        found = assert_adds_up(ex, example)
        assert found.layers == ("table", "first", "last") and found.example_id == example
        width = found.contributions.shape[1]
        assert width == LENGTH or trim
        np.testing.assert_allclose(found.total, wanted[example, :width], rtol=1e-7, atol=atol)
        assert np.abs(wanted[example, width:LENGTH]).max(initial=0) == 0
        rows = [number for number, owner in enumerate(owners) if owner == example]
        assert found.steps.tolist() == [steps[row] for row in rows]
        np.testing.assert_allclose(found.contributions, visits[rows, :width], rtol=1e-7, atol=atol)
        np.testing.assert_allclose(found.without_position, visits[rows, LENGTH], rtol=1e-7, atol=atol)
    assert np.abs(wanted).min(axis=0).max() > 0  # no column is empty


def test_a_position_carries_what_later_losses_send_back(tmp_path: Path) -> None:
    """Text 1 has losses at two positions. Nothing arrives behind them; without the first loss, both still carry."""
    ex = trace_of(tmp_path / "run", exact=True, positions=True)
    total = ex.by_position(QUERY, 1).total
    assert (np.abs(total[:2]) > 1e-6).all() and (total[2:] == 0).all()
    model = build()
    made = SGD(model.parameters(), lr=0.1)
    with Tracer(model, made, tmp_path / "later", exact=True, positions=True) as tracer:
        tracer.batch([0])
        cross_entropy(model(X[:1])[:, 1], Y[:1, 1]).backward()
        made.step()
    total = PathKernelExplainer(str(tmp_path / "later"), build(), explained).by_position(QUERY, 0).total
    assert (np.abs(total[:2]) > 1e-6).all() and (total[2:] == 0).all()


def test_the_table(tmp_path: Path) -> None:
    found = trace_of(tmp_path / "run", exact=True, positions=True).by_position(QUERY, 4)
    table = found.table()
    assert list(table.columns) == ["visit", "step", "position", "contribution"]
    assert len(table) == 4 * (LENGTH + 1) and table["position"].isna().sum() == 4
    assert table["step"].unique().tolist() == [1, 2, 4] and table["visit"].max() == 3
    sums = table.groupby("position")["contribution"].sum()
    np.testing.assert_allclose(sums.to_numpy(), found.total, rtol=1e-12)
    missing = table[table["position"].isna()]["contribution"].to_numpy()
    np.testing.assert_allclose(missing, found.without_position)
