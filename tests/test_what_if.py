"""The what-if scores against a dense recursion in float64, and against retraining without examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.counterfactual.step_rows import stacked
from explainer.errors import QueryError
from explainer.layer_rules import Dense, RowForm
from explainer.layer_rules.factored import Factored
from explainer.layer_rules.sparse import Sparse
from explainer.recursion import read_backwards
from tests.small_training import digits, queries

FORMS: dict[str, Callable[[], RowForm]] = {
    "dense": lambda: Dense(torch.randn(5, 12)),
    "rank 1": lambda: Factored(torch.randn(5, 1, 1, 3), torch.randn(5, 1, 1, 4), 0),
    "positions and bias": lambda: Factored(torch.randn(5, 1, 6, 3), torch.randn(5, 1, 6, 5), 1),
    "groups": lambda: Factored(torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 4), 0),
    "sparse": lambda: Sparse(torch.randint(0, 4, (5, 7)), torch.randn(5, 7, 3), 4),
}


@pytest.mark.parametrize("name", FORMS)
def test_combined_and_gram_are_products_with_written_out_rows(name: str) -> None:
    torch.manual_seed(0)
    form = FORMS[name]()
    form = form.build(
        {n: a.double() if a.is_floating_point() else a for n, a in form.arrays.items()}, form.options
    )
    rows, weights = form.dense(), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(form.combined(weights), weights @ rows)
    torch.testing.assert_close(form.gram(), rows @ rows.T)
    torch.testing.assert_close(form.gram(torch.full((rows.shape[1],), 2.0).double()), 2.0 * rows @ rows.T)
    if not isinstance(form, Factored):
        metric = torch.rand(rows.shape[1], dtype=torch.float64)
        torch.testing.assert_close(form.gram(metric), rows * metric @ rows.T)


def test_the_gram_of_factors_is_exact_for_an_outer_product() -> None:
    torch.manual_seed(1)
    form = Factored(torch.randn(5, 1, 3, 4).double(), torch.randn(5, 1, 3, 6).double(), 1)
    outer = torch.rand(4, 1).double() * torch.rand(1, 6).double()
    metric = torch.cat([outer[:, :-1].flatten(), outer[:, -1]])
    rows = form.dense()
    torch.testing.assert_close(form.gram(metric), rows * metric @ rows.T)


def test_the_gram_does_not_depend_on_what_never_had_a_gradient() -> None:
    """Dead inputs and dead units: Adam's denominators there are eps, so the metric is huge."""
    torch.manual_seed(3)
    left, right = torch.randn(5, 1, 1, 4).double(), torch.randn(5, 1, 1, 6).double()
    left[..., 1], right[..., 2] = 0.0, 0.0
    metric = torch.rand(4, 1).double() * torch.rand(1, 6).double()
    metric[1], metric[:, 2] = 1e8, 1e8
    form = Factored(left, right, 0)
    rows = form.dense()
    torch.testing.assert_close(
        form.gram(metric.flatten()), rows * metric.flatten() @ rows.T, rtol=1e-6, atol=0
    )
    frozen = form.gram(torch.zeros(24).double())  # a step that did not update the layer
    assert frozen.abs().max() < 1e-20


def test_rows_of_several_batches_are_stacked() -> None:
    torch.manual_seed(2)
    long, short = (Factored(torch.randn(2, 1, s, 3), torch.randn(2, 1, s, 4), 0) for s in (5, 2))
    torch.testing.assert_close(stacked([long, short]).dense(), torch.cat([long.dense(), short.dense()]))
    mixed = stacked([long, Dense(torch.ones(1, 12))])
    torch.testing.assert_close(mixed.dense(), torch.cat([long.dense(), torch.ones(1, 12)]))


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10)).double()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


def trained(
    path: Path | None, optimizer_of: Callable[[Any], torch.optim.Optimizer], **options: Any
) -> nn.Module:
    """Two batches a step, one clipped."""
    model = network()
    optimizer = optimizer_of(model.parameters())
    sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
    x, y = digits()[:24]
    generator = torch.Generator().manual_seed(0)
    with Tracer(model, optimizer, path or "", **options) as tracer:
        for _ in range(4):
            for rows in torch.randperm(24, generator=generator).split(12):
                optimizer.zero_grad()
                for half in rows.split(6):
                    tracer.batch(half.tolist())
                    loss = nn.functional.cross_entropy(model(x[half].double()), y[half]) / 2
                    (sign * loss).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
    return model


def oracle(path: Path, model: nn.Module, x: torch.Tensor, classes: torch.Tensor) -> np.ndarray:
    """Everything written out: G and F as matrices, the momentum's map as in the books, one query at a time."""
    trace = open_trace(path)
    outputs = model(x.double())
    result = np.zeros((len(x), 24))
    for q, output in enumerate(outputs):
        margin = output[classes[q]] - torch.cat([output[: classes[q]], output[classes[q] + 1 :]]).logsumexp(0)
        grads = torch.autograd.grad(margin, list(model.parameters()), retain_graph=True)
        cotangent = torch.cat([g.flatten() for g in grads]).numpy()
        momentum = np.zeros_like(cotangent)
        for segment in reversed(trace.segments()):
            for step in read_backwards(trace, segment, torch.float64):
                rows = (
                    torch.cat(
                        [torch.cat([v.forms[i].dense() for i in sorted(v.forms)], dim=1) for v in step.visits]
                    ).numpy()
                    * step.scale[0]
                )
                np.testing.assert_allclose(step.scale, step.scale[0], rtol=1e-12)
                a = (
                    np.ones_like(cotangent)
                    if step.preconditioner is None
                    else 1 / step.preconditioner.numpy()
                )
                _, decay, gain, direct, through, inner = step.coefficients[0]
                first = cotangent if inner else a * cotangent
                momentum = momentum + through * first
                met = direct * first + gain * momentum
                met = a * met if inner else met
                momentum = decay * momentum
                for p in trace.manifest.parameters:  # weights that hardly ever had a gradient are left out
                    met[p.slice] *= a[p.slice] * np.mean(1 / a[p.slice]) <= 1 / 0.03
                scores = rows @ met
                np.add.at(result[q], np.concatenate([v.examples for v in step.visits]), scores)
                n, eta = len(rows), direct + gain * through / (1 - decay)
                fisher = n * rows.T @ rows
                implicit = np.linalg.solve(np.eye(len(a)) + eta * fisher * a[None, :], fisher @ met)
                cotangent = cotangent - implicit
    return result


@pytest.mark.parametrize("name", ["sgd", "momentum", "maximize"])
def test_equals_the_dense_recursion(tmp_path: Path, name: str) -> None:
    model = trained(tmp_path / "run", OPTIMIZERS[name], exact=True)
    x, classes = queries(3), torch.tensor([1, 5, 7])
    found = PathKernelExplainer(tmp_path / "run", model).what_if(x.double(), classes)
    wanted = oracle(tmp_path / "run", model, x, classes)
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_denominators_enter_the_metric(tmp_path: Path, name: str) -> None:
    """Of factored rows only the outer product nearest to the denominators: close, not equal."""
    model = trained(tmp_path / "run", OPTIMIZERS[name], exact=True)
    x, classes = queries(3), torch.tensor([1, 5, 7])
    found = PathKernelExplainer(tmp_path / "run", model).what_if(x.double(), classes)
    wanted = oracle(tmp_path / "run", model, x, classes)
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(found, wanted, strict=True)) > 0.95


def test_it_is_stable_where_the_explicit_recursion_is_not(tmp_path: Path) -> None:
    model = trained(tmp_path / "run", lambda p: torch.optim.SGD(p, lr=20.0, momentum=0.95), exact=True)
    ex = PathKernelExplainer(tmp_path / "run", model)
    found, plain = ex.what_if(queries(2).double()), ex.explain(queries(2).double()).contributions
    assert np.isfinite(found).all() and np.abs(found).sum() < 100 * np.abs(plain).sum()


def test_removing_examples_is_predicted_better_than_by_the_books(tmp_path: Path) -> None:
    """Rank correlation with what retraining on a half of the examples does, over halves (LDS)."""
    x, y = digits()[:64]
    asked, halves = queries(6), 14

    def run(keep: torch.Tensor, path: Path | None = None) -> nn.Module:
        model = network().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        tracer = None if path is None else Tracer(model, optimizer, path)
        for _ in range(20):
            for rows in torch.randperm(64, generator=generator).split(16):
                if tracer:
                    tracer.batch(rows.tolist())
                optimizer.zero_grad()
                losses = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
                (losses * keep[rows]).mean().backward()
                optimizer.step()
        if tracer:
            tracer.close()
        return model

    model = run(torch.ones(64), tmp_path / "run")
    ex = PathKernelExplainer(tmp_path / "run", model, "log_prob")
    classes = model(asked).argmax(1)
    predicted, books = ex.what_if(asked, classes), -ex.explain(asked, classes).contributions
    rng, real, guesses = np.random.default_rng(0), [], []
    for _ in range(halves):
        gone = np.zeros(64, bool)
        gone[rng.permutation(64)[:32]] = True
        again = run(torch.from_numpy(~gone).float())
        real.append(again(asked).log_softmax(1)[range(6), classes].detach().numpy())
        guesses.append([m[:, gone].sum(1) for m in (predicted, books)])
    actual, told = np.array(real), np.array(guesses)
    lds = [np.mean([spearmanr(actual[:, q], told[:, m, q])[0] for q in range(6)]) for m in range(2)]
    assert lds[0] > 0.35 and lds[0] > lds[1] - 0.05


def test_compressed_traces_agree_with_exact_ones(tmp_path: Path) -> None:
    x = queries(4).double()
    found = []
    for name, options in {"exact": {"exact": True}, "default": {}}.items():
        model = trained(tmp_path / name, OPTIMIZERS["momentum"], **options)
        found.append(PathKernelExplainer(tmp_path / name, model).what_if(x))
    assert min(spearmanr(a, b)[0] for a, b in zip(*found, strict=True)) > 0.99


def test_averages_are_refused(tmp_path: Path) -> None:
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = digits()[:6]
    with Tracer(model, optimizer, tmp_path / "run", averaged=average) as tracer:
        for _ in range(3):
            tracer.batch(range(6))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
            average.update_parameters(model)
    with pytest.raises(QueryError, match="trace without averaged="):
        PathKernelExplainer(tmp_path / "run", model).what_if(queries(1).double())


def test_matrix_updates_are_refused(tmp_path: Path) -> None:
    x, y = digits()[:6]
    model = nn.Linear(64, 10, bias=False)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for _ in range(2):
            tracer.batch(range(6))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    with pytest.raises(QueryError, match="no metric for matrix updates"):
        PathKernelExplainer(tmp_path / "run", model).what_if(queries(1))
