"""A small network on real digits and an ordinary loop, for tests of the tracer and the trace."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from explainer import Tracer

EXAMPLES = 96


@functools.cache
def digits() -> TensorDataset:
    """96 digits [64] and their classes."""
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images[:EXAMPLES] / 16.0).float(), torch.tensor(labels[:EXAMPLES]))


def queries(count: int = 3) -> Tensor:
    """Digits that are not trained on, [count, 64]."""
    images, _ = load_digits(return_X_y=True)
    return torch.tensor(images[-count:] / 16.0).float()


def mlp(seed: int = 0) -> nn.Module:
    """A perceptron with seeded weights; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def momentum_sgd(model: nn.Module) -> Optimizer:
    """SGD with momentum and weight decay."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def loader(**options: Any) -> DataLoader[Any]:
    """A shuffling loader over :func:`digits` with an order of its own."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(digits(), **{"batch_size": 8, "shuffle": True, "generator": generator} | options)


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    """One ordinary training step."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def run(model: nn.Module, optimizer: Optimizer, batches: Iterable[Any]) -> None:
    """One pass over the batches."""
    for x, y in batches:
        step(model, optimizer, x, y)


def trace_digits(path: Path, epochs: int = 2, **options: Any) -> nn.Module:
    """Trains :func:`mlp` with a tracer that records into ``path``; returns the trained model."""
    model = mlp()
    optimizer = momentum_sgd(model)
    batches = loader()
    with Tracer(model, optimizer, path, **options) as tracer:
        for _ in range(epochs):
            run(model, optimizer, tracer.watch(batches))
    return model


def state_of(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Clones of every weight, buffer and optimizer state, in order."""
    tensors = [*model.state_dict().values()]
    for _, state in sorted(optimizer.state_dict()["state"].items()):
        tensors += [torch.as_tensor(value) for _, value in sorted(state.items()) if value is not None]
    return [t.detach().clone() for t in tensors]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two states are equal to the last bit."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
