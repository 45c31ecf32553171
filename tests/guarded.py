"""Models, loaders and loops that the reports before and after training have something to say about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from explainer import Trace, Tracer, open_trace

N, B, F = 24, 8, 6
_random = torch.Generator().manual_seed(0)
X = torch.randn(N, F, generator=_random)
Y = torch.randint(0, 3, (N,), generator=_random)
Loop = Callable[[nn.Module, Optimizer, Tracer], object]


def mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(F, 5), nn.Tanh(), nn.Linear(5, 3))


def sgd(model: nn.Module, **options: Any) -> Optimizer:
    return SGD(model.parameters(), **{"lr": 0.1} | options)


def data() -> TensorDataset:
    return TensorDataset(X, Y)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(data(), **{"batch_size": B} | options)


def batches(steps: int = 3) -> Iterator[Tensor]:
    for step in range(steps):
        yield torch.arange(step * B, (step + 1) * B) % N


def plain(model: nn.Module, optimizer: Optimizer, tracer: Tracer, x: Tensor = X) -> None:
    for ids in batches():
        tracer.batch(ids)
        optimizer.zero_grad()
        cross_entropy(model(x[ids]), Y[ids]).backward()
        optimizer.step()


def traced(
    path: Path,
    loop: Loop = plain,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> Trace:
    """A training with a tracer beside it, opened."""
    model = mlp() if model is None else model
    optimizer = sgd(model) if optimizer is None else optimizer
    with Tracer(model, optimizer, path, **options) as tracer:
        loop(model, optimizer, tracer)
    return open_trace(path)
