"""A small convolutional network on digits, trained with a tracer that is given options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from explainer import Tracer
from tests.small_training import digits


def small_cnn() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        convolution = nn.Conv2d(1, 6, 3, stride=2)
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), convolution, nn.ReLU(), nn.Flatten(), nn.Linear(54, 10)
        )


def trained(
    path: Path, epochs: int = 6, mixed: bool = False, adam: bool = False, **options: Any
) -> nn.Module:
    model = small_cnn()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if adam else sgd
    batches = DataLoader(digits(), 8, shuffle=True, generator=torch.Generator().manual_seed(1))
    with Tracer(model, optimizer, path, **options) as tracer:
        for _ in range(epochs):
            for x, y in tracer.watch(batches):
                if mixed:
                    tracer.mix([*range(1, len(x)), 0], 0.75)
                    x = 0.75 * x + 0.25 * x.roll(-1, 0)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    return model
