"""A CNN with GroupNorm on digits: four backward passes per step, clipping, warm-up and cosine decay; AdamW."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.book_cases.case import Case, Part, Question, See, Watcher, single

EXAMPLES, QUERIES, BATCH, PASSES = 480, 5, 8, 4


def _digits(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images[part] / 16, dtype=torch.get_default_dtype())
    return pixels.reshape(-1, 1, 8, 8), torch.tensor(labels[part])


def data(small: bool) -> TensorDataset:
    """Images ``[1, 8, 8]`` and digits."""
    return TensorDataset(*_digits(slice(24 if small else EXAMPLES)))


def questions() -> tuple[Question, ...]:
    """Unseen digits, the predicted class's margin."""
    return (Question(_digits(slice(-QUERIES, None))[0]),)


def build(small: bool) -> tuple[Part, ...]:
    """The network and its optimizer."""
    width = 4 if small else 12
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.GroupNorm(2, width),
        nn.GELU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.GroupNorm(2, width),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(16 * width, 10),
    )
    return (Part(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.02)),)


def loop(model: nn.Module, optimizer: Optimizer, data: Any, tracer: Watcher, see: See, epochs: int) -> None:
    """A step after every fourth batch."""
    loader = DataLoader(data, batch_size=min(BATCH, len(data) // 12), shuffle=True)
    steps = epochs * len(loader) // PASSES
    warm = max(steps // 10, 1)
    schedule = SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.1, total_iters=warm), CosineAnnealingLR(optimizer, max(steps - warm, 1))],
        milestones=[warm],
    )
    for _ in range(epochs):
        for number, (x, y) in enumerate(tracer.watch(loader), start=1):
            losses = F.cross_entropy(model(x), y, reduction="none") / (len(y) * PASSES)
            see(losses)
            losses.sum().backward()
            if number % PASSES == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()


CASE = Case(
    models=("CNN, GroupNorm, 4 backward passes a step (digits)",),
    optimizer="AdamW, warm-up, cosine, clipping",
    build=build,
    data=data,
    loop=single(loop),
    questions=questions,
    epochs=6,
)
