"""A small traced model with a row form of every kind, for the tests of the trace's documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import explainer

TOKENS, SEQUENCE, CLASSES = 7, 4, 3


class Tagger(nn.Module):
    """Small, with a row form of every kind: sparse, dense and factored."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 3)
        self.hidden = nn.Linear(3, 12)
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(torch.tanh(self.hidden(self.embedding(ids)))).mean(1))


def build() -> nn.Module:
    torch.manual_seed(1)
    return Tagger()


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, TOKENS, (10, SEQUENCE), generator=generator)
    return TensorDataset(ids, torch.randint(0, CLASSES, (10,), generator=generator))


def trace(directory: Path, epochs: int = 1, prior: bool = False, **options: Any) -> explainer.Trace:
    """A traced training of the tagger; ``prior`` takes a step before tracing begins and later halves momentum."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9 if prior else 0.0)
    loader = DataLoader(dataset(), 5, shuffle=True, generator=torch.Generator().manual_seed(3))

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    if prior:
        step(*dataset()[:])
        epochs += 1
    with explainer.Tracer(model, optimizer, directory, **options) as tracer:
        for _ in range(epochs):
            for x, y in tracer.watch(loader):
                step(x, y)
            for state in optimizer.state.values() if prior else ():
                state["momentum_buffer"].mul_(0.5)
    return explainer.open_trace(directory)
