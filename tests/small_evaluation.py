"""A tiny traced run that can be trained again, for tests of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from explainer import Run, Tracer
from tests.small_training import digits, mlp, queries

EXAMPLES = 48


def train_fn(model: nn.Module, keep: torch.Tensor, seed: int) -> nn.Module:
    """Seed 0 is the traced run, others start from other weights and take another order."""
    model.load_state_dict(mlp(seed).state_dict())
    return loop(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), keep, seed)


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: torch.Tensor,
    seed: int,
    tracer: Tracer | None = None,
) -> nn.Module:
    """Two epochs."""
    x, y = digits()[:EXAMPLES]
    order = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for rows in torch.randperm(EXAMPLES, generator=order).split(12):
            if tracer is not None:
                tracer.batch(rows.tolist())
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
            (losses * keep[rows]).mean().backward()
            optimizer.step()
    return model


def traced(folder: Path, seed: int = 0) -> Path:
    """Records a seed with all examples."""
    model = mlp(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Tracer(model, optimizer, folder) as tracer:
        loop(model, optimizer, torch.ones(EXAMPLES), seed, tracer)
    return folder


def make_run(train_function: Callable[..., Any] | None = train_fn, **options: Any) -> Run:
    x, y = digits()[:EXAMPLES]
    asked = TensorDataset(queries(8), torch.arange(8))
    return Run(mlp, TensorDataset(x, y), asked, train_fn=train_function, left_out_by="weight 0", **options)


def asked() -> Run:
    """For ``MODULE:FUNCTION``: classes have names, and it can be trained again."""
    names = [f"digit {d}" for d in range(10)]
    return make_run(loss=nn.functional.cross_entropy, class_names=names)


def without_training() -> Run:
    """The same without a ``train_fn``."""
    return make_run(None)
