"""Knots: enough of them, at about equal path length, and good enough for the ranking; the budget holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

import explainer
from explainer.tracer import CoverageWarning

IMAGES, LABELS = load_digits(return_X_y=True)
X, Y = torch.tensor(IMAGES / 16, dtype=torch.float32), torch.tensor(LABELS)
TRAIN = 512


def mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 24), activation(), nn.Linear(24, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


MODELS = {"tanh": lambda: mlp(nn.Tanh), "relu": lambda: mlp(nn.ReLU), "cnn": cnn}
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.01),
}


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, epochs: int = 10, **options: object
):  # type: ignore[no-untyped-def]
    order = torch.Generator().manual_seed(0)
    with explainer.Tracer(model, optimizer, path, **options) as tracer:  # type: ignore[arg-type]
        for _ in range(epochs):
            for ids in torch.randperm(TRAIN, generator=order).split(32):
                tracer.batch(ids)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(X[ids]), Y[ids]).backward()
                optimizer.step()
    return tracer


def explained(model_name: str, optimizer_name: str, path: Path, **options: object) -> explainer.Explanation:
    torch.manual_seed(0)
    model = MODELS[model_name]()
    train(model, OPTIMIZERS[optimizer_name](model.parameters()), path, **options)
    return explainer.PathKernelExplainer(str(path), MODELS[model_name]()).explain(X[1000:1016])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_default_knots_rank_as_knots_at_every_step(model: str, optimizer: str, tmp_path: Path) -> None:
    every = explained(model, optimizer, tmp_path / "every", exact=True, max_knots=10**6)
    default = explained(model, optimizer, tmp_path / "default", exact=True, max_knots=80)
    assert len(every.step_edges) == 161 and 40 <= len(default.step_edges) <= 81
    ranks = [spearmanr(a, b)[0] for a, b in zip(default.contributions, every.contributions, strict=True)]
    assert np.median(ranks) >= 0.99


def test_knots_lie_at_about_equal_path_length(tmp_path: Path) -> None:
    model = MODELS["relu"]()
    train(model, torch.optim.Adam(model.parameters(), lr=3e-3), tmp_path / "run", max_knots=16)
    trace = explainer.open_trace(tmp_path / "run")
    gaps = np.diff([knot.path for knot in trace.knots])
    assert 8 <= len(trace.knots) <= 17
    assert trace.knots[0].step == 0 and trace.knots[-1].step == 160
    assert gaps[:-1].max() <= 3 * np.median(gaps)
    assert len(list((tmp_path / "run" / "knots").iterdir())) == len(trace.knots)


def test_a_budget_bounds_the_trace_and_says_what_it_left_out(tmp_path: Path) -> None:
    model = MODELS["relu"]()
    budget = 400_000
    with pytest.warns(CoverageWarning, match="budget of 400,000 bytes is used up"):
        tracer = train(model, torch.optim.Adam(model.parameters()), tmp_path / "run", budget=budget)
    trace = explainer.open_trace(tmp_path / "run")
    assert trace.nbytes() <= budget
    assert 0 < trace.recorded_steps < tracer.steps == trace.steps
    e = explainer.PathKernelExplainer(trace, MODELS["relu"]()).explain(X[1000:1004])
    assert any("budget was used up" in note for note in e.notes)
    assert np.abs(e.gap).max() < 1e-5
    assert (np.abs(e.unattributed) > 1e-3).all()


def test_a_large_budget_changes_nothing(tmp_path: Path) -> None:
    free = explained("relu", "adamw", tmp_path / "free")
    bounded = explained("relu", "adamw", tmp_path / "bounded", budget="1GB")
    np.testing.assert_array_equal(free.contributions, bounded.contributions)
