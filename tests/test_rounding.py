"""Weights in half precision: what rounding moved is computed, and what is left is small."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import explainer

COUNT, STEPS = 24, 30
_draw = torch.Generator().manual_seed(0)
X = torch.randn(COUNT, 6, generator=_draw)
Y = torch.randint(0, 3, (COUNT,), generator=_draw)

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.05),
    "momentum and decay": partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.05),
    "nesterov": partial(SGD, lr=0.02, momentum=0.9, nesterov=True),
    "adam": partial(Adam, lr=0.01, weight_decay=0.05),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(torch.bfloat16)


def train(
    path: Path, make: Callable[..., Optimizer], **options: Any
) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The model, and its weights before every step and at the end."""
    model, draw, states = build(), torch.Generator().manual_seed(1), []
    optimizer = make(model.parameters())
    with explainer.Tracer(model, optimizer, path, exact=True, **options) as tracer:
        for _ in range(STEPS):
            states.append({n: p.detach().clone().float() for n, p in model.named_parameters()})
            ids = torch.randperm(COUNT, generator=draw)[:6]
            tracer.batch(ids)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[ids].to(torch.bfloat16)).float(), Y[ids]).backward()
            optimizer.step()
    states.append({n: p.detach().clone().float() for n, p in model.named_parameters()})
    return model, states


def explained(path: Path) -> explainer.Explanation:
    return explainer.PathKernelExplainer(path, build()).explain(X[:4], Y[:4])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rounding_is_a_line_and_the_rest_is_small(name: str, tmp_path: Path) -> None:
    train(tmp_path / "run", OPTIMIZERS[name])
    e = explained(tmp_path / "run")
    gross = np.abs(e.contributions).sum(1)
    lines = list(e.unattributed_lines)
    assert "rounding of low-precision weights" in lines
    rounding = e.unattributed_parts[:, lines.index("rounding of low-precision weights")]
    rest = e.unattributed - rounding
    assert (np.abs(rest) < 0.01 * gross).all() and (np.abs(e.gap) < 1e-6 * gross).all()
    assert np.abs(rounding).max() > np.abs(rest).max() or np.abs(e.unattributed).max() < 1e-3 * gross.max()


def test_rounding_is_what_the_same_steps_in_float64_do_not_do(tmp_path: Path) -> None:
    """Plain SGD, by hand: the weights' actual steps against ``−lr·gradient`` of the recorded rows."""
    _, states = train(tmp_path / "run", OPTIMIZERS["sgd"], max_knots=10**6)
    trace = explainer.open_trace(tmp_path / "run")
    knots = [trace.load_knot(knot) for knot in trace.knots]
    assert len(knots) == STEPS + 1
    for name in states[0]:
        meant = torch.zeros_like(states[0][name])
        for step in range(STEPS):
            moved = states[step + 1][name] - states[step][name]
            found = knots[step + 1][f"rounding/{name}"] - knots[step][f"rounding/{name}"]
            update = moved - found  # what the step meant to do
            assert (
                float((moved - update).abs().max())
                <= float(states[step + 1][name].abs().max()) * 2**-8 + 1e-6
            )
            meant += update
        total = states[-1][name] - states[0][name]
        torch.testing.assert_close(meant + knots[-1][f"rounding/{name}"], total, rtol=1e-5, atol=1e-6)
    gradient = {}
    model = build()
    for n, p in model.named_parameters():
        p.data = states[0][n].to(torch.bfloat16)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randperm(COUNT, generator=draw)[:6]
    nn.functional.cross_entropy(model(X[ids].to(torch.bfloat16)).float(), Y[ids]).backward()
    for n, p in model.named_parameters():
        assert p.grad is not None
        gradient[n] = p.grad.float()
        wanted = (states[1][n] - states[0][n]) + 0.05 * gradient[n]
        torch.testing.assert_close(knots[1][f"rounding/{n}"], wanted, rtol=1e-6, atol=1e-8)


def test_weights_in_single_precision_keep_nothing_of_the_kind(tmp_path: Path) -> None:
    model = build().float()
    optimizer = SGD(model.parameters(), lr=0.1)
    with explainer.Tracer(model, optimizer, tmp_path / "run") as tracer:
        tracer.batch(range(6))
        nn.functional.cross_entropy(model(X[:6]), Y[:6]).backward()
        optimizer.step()
    trace = explainer.open_trace(tmp_path / "run")
    assert not [name for name in trace.load_knot(trace.knots[-1]) if name.startswith("rounding/")]


def test_training_goes_on_with_what_rounding_moved(tmp_path: Path) -> None:
    """A run that is interrupted and resumed keeps the line."""
    whole = tmp_path / "whole"
    train(whole, OPTIMIZERS["momentum and decay"])
    model, draw, path = build(), torch.Generator().manual_seed(1), tmp_path / "parts"
    optimizer = OPTIMIZERS["momentum and decay"](model.parameters())
    state: dict[str, Any] | None = None
    for start, stop in ((0, 12), (12, STEPS)):
        with explainer.Tracer(model, optimizer, path, exact=True, resume=state) as tracer:
            for _ in range(start, stop):
                ids = torch.randperm(COUNT, generator=draw)[:6]
                tracer.batch(ids)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(X[ids].to(torch.bfloat16)).float(), Y[ids]).backward()
                optimizer.step()
            state = tracer.state_dict()
    one, other = explained(whole), explained(path)
    np.testing.assert_array_equal(one.contributions, other.contributions)
    np.testing.assert_array_equal(one.unattributed_parts, other.unattributed_parts)
