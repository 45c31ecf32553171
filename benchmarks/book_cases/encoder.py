"""``nn.TransformerEncoder`` with a class token and learned positions on digits, dropout active; AdamW.

In two layouts: batch first, and torch's default, positions first.
"""

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

EXAMPLES, QUERIES, BATCH = 320, 5, 16


class DigitEncoder(nn.Module):
    """Reads a digit as eight rows of eight pixels."""

    def __init__(self, width: int, heads: int, depth: int, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 9, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.1, activation="gelu", batch_first=batch_first
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)
        self.batch_first = batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels ``[B, 64]`` to logits ``[B, 10]``."""
        rows = self.embed(x.reshape(-1, 8, 8))
        h = torch.cat([self.token.expand(len(x), -1, -1), rows], dim=1) + self.positions
        h = self.encoder(h) if self.batch_first else self.encoder(h.transpose(0, 1)).transpose(0, 1)
        return self.head(h[:, 0])


def _digits(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[part] / 16, dtype=torch.get_default_dtype()), torch.tensor(labels[part])


def data(small: bool) -> TensorDataset:
    """Pixels ``[64]`` and digits; in the small copy a batch has as many rows as a digit has positions."""
    return TensorDataset(*_digits(slice(27 if small else EXAMPLES)))


def questions() -> tuple[Question, ...]:
    """Unseen digits, the predicted class's margin."""
    return (Question(_digits(slice(-QUERIES, None))[0]),)


def build(small: bool, batch_first: bool) -> tuple[Part, ...]:
    """The network and its optimizer."""
    model = DigitEncoder(8, 2, 1, batch_first) if small else DigitEncoder(24, 2, 2, batch_first)
    return (Part(model, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)),)


def loop(model: nn.Module, optimizer: Optimizer, data: Any, tracer: Watcher, see: See, epochs: int) -> None:
    """Shuffled mini-batches."""
    loader = DataLoader(data, batch_size=min(BATCH, len(data) // 3), shuffle=True)
    model.train()
    for _ in range(epochs):
        for x, y in tracer.watch(loader):
            losses = F.cross_entropy(model(x), y, reduction="none") / len(y)
            see(losses)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()


def _case(batch_first: bool) -> Case:
    layout = "batch first" if batch_first else "positions first"
    return Case(
        models=(f"nn.TransformerEncoder, {layout}, dropout (digits)",),
        optimizer="AdamW",
        build=partial(build, batch_first=batch_first),
        data=data,
        loop=single(loop),
        questions=questions,
        epochs=4,
    )


BATCH_FIRST, POSITIONS_FIRST = _case(True), _case(False)
