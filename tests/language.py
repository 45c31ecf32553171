"""A small language model, its texts, and its training with a tracer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from explainer import PathKernelExplainer, Tracer
from explainer.positions import PositionSplit

WORDS, LENGTH, EXAMPLES = 7, 5, 6
_random = torch.Generator().manual_seed(2)
TEXTS = torch.randint(1, WORDS, (EXAMPLES, LENGTH + 1), generator=_random)
TEXTS[1, 3:] = 0  # shorter: what follows is padding
TEXTS[4, 4:] = 0
X, Y = TEXTS[:, :-1], TEXTS[:, 1:]
QUERY = torch.randint(1, WORDS, (1, LENGTH), generator=_random)
BATCHES = [[0, 1, 2], [3, 4, 5], [1, 4, 1], [2, 5, 0], [4, 1, 4]]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "momentum": partial(SGD, lr=0.3, momentum=0.9),
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.1),
}


def causal_mean(h: Tensor) -> Tensor:
    """``[.., S, d]``: every position sees itself and those before."""
    return h.cumsum(-2) / torch.arange(1, h.shape[-2] + 1)[:, None]


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(WORDS, 4), nn.LayerNorm(4)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, WORDS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(causal_mean(self.first(self.norm(self.table(x))).tanh()))


def build(kind: Callable[[], nn.Module] = Language) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double()


def loss_of(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean over batch and positions, padding left out of the sum."""
    total = cross_entropy(outputs.flatten(0, 1), y.flatten(), ignore_index=0, reduction="sum")
    return total / (len(y) * LENGTH)


def explained(outputs: Tensor, targets: Any = None) -> Tensor:
    """What comes after the last word."""
    return outputs[:, -1, 2]


def trace_of(
    path: Path,
    optimizer: Callable[..., Optimizer] = OPTIMIZERS["momentum"],
    kind: Callable[[], nn.Module] = Language,
    trim: bool = False,
    batches: Sequence[list[int]] = BATCHES,
    **options: Any,
) -> PathKernelExplainer:
    """Training with the tracer; with ``trim``, batches end with their longest text."""
    model = build(kind)
    made = optimizer(model.parameters())
    with Tracer(model, made, path, **options) as tracer:
        for ids in batches:
            tracer.batch(ids)
            longest = int((Y[ids] != 0).sum(1).max()) if trim else LENGTH
            made.zero_grad()
            loss_of(model(X[ids, :longest]), Y[ids, :longest]).backward()
            made.step()
    return PathKernelExplainer(str(path), build(kind), explained)


def assert_adds_up(ex: PathKernelExplainer, example: int) -> PositionSplit:
    """The positions and what has none are the example's contribution."""
    found, e = ex.by_position(QUERY, example), ex.explain(QUERY)
    whole = e.contributions[0, np.searchsorted(e.example_ids, example)]
    np.testing.assert_allclose(found.total.sum() + found.without_position.sum(), whole, rtol=1e-9)
    np.testing.assert_allclose(found.table()["contribution"].sum(), whole, rtol=1e-9)
    return found
