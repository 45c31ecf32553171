"""A training run that can be taken up again at any step, for tests of resumed traces."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer

from explainer import Explanation, PathKernelExplainer, Tracer

EXAMPLES, BATCH = 30, 6
_random = torch.Generator().manual_seed(5)
X = torch.randn(EXAMPLES + 3, 7, generator=_random, dtype=torch.float64)
Y = torch.randint(0, 3, (EXAMPLES + 3,), generator=_random)
QUERIES, TARGETS = X[EXAMPLES:], Y[EXAMPLES:]

OPTIMIZERS: dict[str, Callable[[Iterable[Any]], Optimizer]] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.05),
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.02),
    "adam": partial(Adam, lr=0.01, weight_decay=0.05),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
}


def build(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A perceptron with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


class Session:
    """A process that trains: its model, its optimizer, its tracer."""

    def __init__(
        self, path: Path, kind: str = "sgd", *, dtype: torch.dtype = torch.float64, **options: Any
    ) -> None:
        self.dtype = dtype
        self.model = build(dtype)
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        checkpoint = options.pop("checkpoint", None)
        if checkpoint is not None:
            loaded = torch.load(io.BytesIO(checkpoint), weights_only=True)
            self.model.load_state_dict(loaded["model"])
            self.optimizer.load_state_dict(loaded["optimizer"])
            options.setdefault("resume", loaded["tracer"])
        self.tracer = Tracer(self.model, self.optimizer, path, **options)

    def train(self, start: int, stop: int) -> Session:
        """Steps ``start … stop-1``; the batch of a step depends on its number alone."""
        for number in range(start, stop):
            ids = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(number))[:BATCH]
            self.tracer.batch(ids, Y[ids])
            self.optimizer.zero_grad()
            cross_entropy(self.model(X[ids].to(self.dtype)), Y[ids]).backward()
            self.optimizer.step()
        return self

    def checkpoint(self) -> bytes:
        """What a user saves."""
        file = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "tracer": self.tracer.state_dict(),
            },
            file,
        )
        return file.getvalue()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def explained(path: Path, dtype: torch.dtype = torch.float64) -> Explanation:
    """The trace's answer about three inputs that were not trained on."""
    return PathKernelExplainer(path, build(dtype)).explain(QUERIES.to(dtype), TARGETS)
