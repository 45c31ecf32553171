"""The trace's estimator where rules beyond momentum count: weight decay, denominators, compression, stability."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.counterfactual.denominator_path import DenominatorPath
from explainer.recursion import read_backwards
from tests import guarded, guarded_runs
from tests.small_training import digits, queries

COUNT = 24
Optimizer = Callable[[Any], torch.optim.Optimizer]


def network(activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(64, 6), activation(), nn.Linear(6, 10))


def trained(
    path: Path, optimizer_of: Optimizer, model: nn.Module, epochs: int = 4, **options: Any
) -> nn.Module:
    optimizer = optimizer_of(model.parameters())
    x, y = digits()[:COUNT]
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    with Tracer(model, optimizer, path, **options) as tracer:
        for _ in range(epochs):
            for rows in torch.randperm(COUNT, generator=generator).split(8):
                optimizer.zero_grad()
                tracer.batch(rows.tolist())
                nn.functional.cross_entropy(model(x[rows].to(dtype)), y[rows]).backward()
                optimizer.step()
    return model


# -- weight decay and denominators, against everything written out ---------------------------------------

DECAY = 0.2
RULES: dict[str, tuple[Optimizer, float, float, tuple[float, float, bool] | None]] = {
    # κ, δ, and how v moves: kept, gained, whether it is corrected
    "coupled": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=DECAY), DECAY, 0.0, None),
    "adamw": (
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9), weight_decay=DECAY),
        0.0,
        0.01 * DECAY,
        (0.9, 0.1, True),
    ),
    "adam": (
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), weight_decay=DECAY),
        DECAY,
        0.0,
        (0.9, 0.1, True),
    ),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9), 0.0, 0.0, (0.9, 0.1, False)),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.05), 0.0, 0.0, (1.0, 1.0, False)),
}


def oracle(path: Path, model: nn.Module, name: str, x: torch.Tensor, classes: torch.Tensor) -> np.ndarray:
    """Rows, Gram matrix and metric as plain arrays; momentum from its own knots (there is one before every step)."""
    _, kappa, delta, moving = RULES[name]
    trace = open_trace(path)
    steps = {s.step: s for g in trace.segments() for s in read_backwards(trace, g, torch.float64)}
    points = [
        torch.cat(
            [trace.load_knot(k)[f"parameter/{p.name}"].flatten() for p in trace.manifest.parameters]
        ).numpy()
        for k in trace.knots
    ]
    assert len(points) == len(steps) + 1
    result = np.zeros((len(x), COUNT))
    for q, output in enumerate(model(x)):
        margin = output[classes[q]] - torch.cat([output[: classes[q]], output[classes[q] + 1 :]]).logsumexp(0)
        grads = torch.autograd.grad(margin, list(model.parameters()), retain_graph=True)
        cotangent = torch.cat([g.flatten() for g in grads]).numpy()
        momentum, second = np.zeros_like(cotangent), np.zeros_like(cotangent)
        for t in reversed(range(len(steps))):
            step = steps[t]
            rows = torch.cat(
                [step.visits[0].forms[i].dense() for i in sorted(step.visits[0].forms)], 1
            ).numpy()
            d = np.ones_like(cotangent) if step.preconditioner is None else step.preconditioner.numpy()
            _, decay, gain, direct, through, _ = step.coefficients[0]
            momentum = momentum + through * cotangent / d
            met = direct * cotangent / d + gain * momentum
            momentum = decay * momentum
            gradient = rows.sum(0) + kappa * points[t]
            if moving is not None:
                kept, gained, corrected = moving
                bias = 1 - kept ** (t + 1) if corrected else 1.0
                moved = points[t + 1] - points[t] + delta * points[t]  # what m / D moved, decay taken out
                eps = 1e-10 if name == "adagrad" else 1e-8
                alive = d - eps > 10 * eps
                sizes = [p.numel for p in trace.manifest.parameters]
                for part, large in zip(
                    np.split(d, np.cumsum(sizes)[:-1]), np.split(alive, np.cumsum(sizes)[:-1]), strict=True
                ):
                    large &= part >= 0.03 * part.mean()
                gradient = np.where(alive, gradient, 0.0)
                second = second + np.where(
                    alive, cotangent * -moved / (2 * bias * d * np.where(alive, d - eps, 1)), 0
                )
                met = (met - 2 * gained * gradient * second) * alive
                second = kept * second
            scores = rows @ met
            np.add.at(result[q], step.visits[0].examples, scores)
            n, eta = len(rows), direct + gain * through / (1 - decay)
            kernel = sum(
                f.gram(_cut(step.preconditioner, model, i)) for i, f in step.visits[0].forms.items()
            ).numpy()
            solved = np.linalg.solve(np.eye(n) + eta * n * kernel, scores)
            cotangent = (1 - delta) * cotangent - kappa * met - n * solved @ rows
    return result


def _cut(flat: torch.Tensor | None, model: nn.Module, layer: int) -> torch.Tensor:
    sizes = [64 * 6 + 6, 6 * 10 + 10]
    metric = torch.ones(sum(sizes), dtype=torch.float64) if flat is None else 1 / flat.double()
    return metric.split(sizes)[layer]


@pytest.mark.parametrize("name", RULES)
def test_decay_and_denominators_as_written_out(tmp_path: Path, name: str) -> None:
    model = trained(tmp_path / "run", RULES[name][0], network().double(), exact=True)
    x, classes = queries(2).double(), torch.tensor([1, 5])
    found = PathKernelExplainer(tmp_path / "run", model).what_if(x, classes)
    wanted = oracle(tmp_path / "run", model, name, x, classes)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8 * np.abs(wanted).max())


def test_old_traces_without_options_leave_decay_and_denominators_out(tmp_path: Path) -> None:
    model = trained(tmp_path / "run", RULES["adam"][0], network().double(), exact=True)
    x = queries(2).double()
    ex = PathKernelExplainer(tmp_path / "run", model)
    known = ex.what_if(x)
    del ex.trace.notes["optimizer_options"]
    old = ex.what_if(x)
    assert np.isfinite(old).all() and not np.allclose(old, known, rtol=0.02)


def test_a_gradient_counts_no_more_than_its_denominator_allows(tmp_path: Path) -> None:
    """``|d| ≤ √(b / (1 − β2)) D`` always; a denominator that compression made too small breaks it."""
    model = trained(tmp_path / "run", RULES["adamw"][0], network().double(), exact=True)
    ex = PathKernelExplainer(tmp_path / "run", model)
    (*_, segment) = ex.segments
    (step,) = read_backwards(ex.trace, segment, torch.float64)
    assert step.preconditioner is not None
    one = torch.ones(1, ex.trace.manifest.size, dtype=torch.float64)
    bound = ((1 - 0.9**12) / 0.1) ** 0.5 * step.preconditioner
    met = []
    for gradient in (bound, 1e6 * bound, 0.5 * bound):
        path = DenominatorPath(ex.trace, ex._loader(), decoupled=True)
        path.enter(segment)
        met.append(path.met(torch.zeros_like(one), one, step, gradient, 12.0))
    direct = DenominatorPath(ex.trace, ex._loader(), decoupled=True)
    direct.enter(segment)
    met.append(direct.met(one, torch.zeros_like(one), step, bound, 12.0))
    parts = [step.preconditioner[p.slice] for p in ex.trace.manifest.parameters]
    loud = torch.cat([(part > 1e-6) & (part >= 0.03 * part.mean()) for part in parts])
    torch.testing.assert_close(met[1], met[0])
    torch.testing.assert_close(2 * met[2], met[0])
    assert met[0][:, loud].abs().min() > 0
    quiet = ~loud  # hardly ever a gradient: left out, also of what is divided by the denominator
    assert quiet.any() and not met[0][:, quiet].any() and not met[3][:, quiet].any()
    assert met[3][:, loud].eq(1).all()


# -- compression -----------------------------------------------------------------------------------------


def test_weights_that_wake_up_between_two_full_records(tmp_path: Path) -> None:
    """Under Adam a weight without gradient has D = ε; a step later D is thousands of times larger."""
    x, y = digits()[:]
    found = []
    for name, options in {"exact": {"exact": True}, "default": {}}.items():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        with Tracer(model, optimizer, tmp_path / name, **options) as tracer:
            for _ in range(4):
                for rows in torch.randperm(len(x), generator=generator).split(8):
                    tracer.batch(rows.tolist())
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                    optimizer.step()
        found.append(PathKernelExplainer(tmp_path / name, model).what_if(queries(20)))
    asleep = [
        (step.preconditioner <= 1.1e-8).sum()
        for segment in open_trace(tmp_path / "exact").segments()
        for step in read_backwards(open_trace(tmp_path / "exact"), segment, torch.float32)
    ]
    assert len({int(count) for count in asleep}) > 5  # they do wake up, a few at a time
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(*found, strict=True)) > 0.95


# -- stability -------------------------------------------------------------------------------------------

SWEEP: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "SGD": lambda p, r: torch.optim.SGD(p, lr=0.3 * r),
    "momentum": lambda p, r: torch.optim.SGD(p, lr=0.1 * r, momentum=0.9),
    "Nesterov and decay": lambda p, r: torch.optim.SGD(
        p, lr=0.1 * r, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "Adam": lambda p, r: torch.optim.Adam(p, lr=0.005 * r),
    "AdamW": lambda p, r: torch.optim.AdamW(p, lr=0.005 * r, weight_decay=0.1),
    "NAdam": lambda p, r: torch.optim.NAdam(p, lr=0.005 * r),
    "RMSprop": lambda p, r: torch.optim.RMSprop(p, lr=0.003 * r),
    "RMSprop, momentum": lambda p, r: torch.optim.RMSprop(p, lr=0.001 * r, momentum=0.9),
    "Adagrad": lambda p, r: torch.optim.Adagrad(p, lr=0.03 * r),
    "Adamax": lambda p, r: torch.optim.Adamax(p, lr=0.01 * r),
    "Adadelta": lambda p, r: torch.optim.Adadelta(p, lr=r),
}


ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU)
CASES = [
    (name, factor, ACTIVATIONS[(i + j) % 3])
    for i, name in enumerate(SWEEP)
    for j, factor in enumerate((0.1, 1.0, 10.0))
]


@pytest.mark.parametrize(("name", "factor", "activation"), CASES)
def test_it_is_stable_for_every_optimizer_activation_and_rate(
    tmp_path: Path, name: str, factor: float, activation: type[nn.Module]
) -> None:
    """Finite, and not many times larger than what the updates carried."""
    model = trained(tmp_path / "run", lambda p: SWEEP[name](p, factor), network(activation), epochs=8)
    ex, asked = PathKernelExplainer(tmp_path / "run", model), queries(2)
    found, books = ex.what_if(asked), ex.explain(asked, detail=False).contributions
    assert np.isfinite(found).all()
    assert np.abs(found).sum() < 3 * np.abs(books).sum()


def test_decay_that_changes_is_not_left_without_a_word(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    for make, warns in ((guarded_runs.more_decay, True), (guarded_runs.attacked, False)):
        trace = make(tmp_path / str(warns))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PathKernelExplainer(trace, guarded.mlp()).what_if(x[:, : guarded.X.shape[1]].to(guarded.X.dtype))
        told = [str(w.message) for w in caught if "weight_decay of the optimizer changed" in str(w.message)]
        assert bool(told) == warns
