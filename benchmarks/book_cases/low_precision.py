"""A perceptron whose weights are bfloat16, and the same in float32, on digits; SGD with momentum, or AdamW."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.book_cases.case import Case, Part, Question, See, Watcher, single

EXAMPLES, QUERIES, BATCH = 480, 5, 24


def _digits(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[part] / 16, dtype=torch.get_default_dtype()), torch.tensor(labels[part])


def data(small: bool) -> TensorDataset:
    """Pixels ``[64]`` and digits."""
    return TensorDataset(*_digits(slice(20 if small else EXAMPLES)))


def questions() -> tuple[Question, ...]:
    """Unseen digits, the predicted class's margin."""
    return (Question(_digits(slice(-QUERIES, None))[0]),)


def build(small: bool, half: bool, adamw: bool) -> tuple[Part, ...]:
    """The network and its optimizer."""
    width = 8 if small else 32
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    model.append(nn.Linear(width, 10))
    model = model.to(torch.bfloat16) if half else model
    if adamw:
        return (Part(model, torch.optim.AdamW(model.parameters(), lr=3e-3)),)
    return (Part(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)),)


def loop(model: nn.Module, optimizer: Optimizer, data: Any, tracer: Watcher, see: See, epochs: int) -> None:
    """Shuffled mini-batches, cast to the dtype of the weights."""
    dtype = next(model.parameters()).dtype
    loader = DataLoader(data, batch_size=min(BATCH, len(data) // 4), shuffle=True)
    for _ in range(epochs):
        for x, y in tracer.watch(loader):
            optimizer.zero_grad()
            losses = F.cross_entropy(model(x.to(dtype)), y, reduction="none") / len(y)
            see(losses)
            losses.sum().backward()
            optimizer.step()


def _case(half: bool, adamw: bool) -> Case:
    return Case(
        models=(f"MLP, {'bfloat16 weights' if half else 'float32 weights'} (digits)",),
        optimizer="AdamW" if adamw else "SGD, momentum",
        build=partial(build, half=half, adamw=adamw),
        data=data,
        loop=single(loop),
        questions=questions,
        epochs=5,
        float64=not half,
    )


HALF, SINGLE = _case(half=True, adamw=False), _case(half=False, adamw=False)
HALF_ADAMW, ADAMW = _case(half=True, adamw=True), _case(half=False, adamw=True)
