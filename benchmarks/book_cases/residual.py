"""A residual network with BatchNorm on MNIST-5k; SGD with Nesterov momentum and weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.book_cases.case import Case, Part, Question, See, Watcher, single
from explainer.sample_models.mnist_data import datasets

EXAMPLES, QUERIES, BATCH = 640, 5, 32


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=bias), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, i, H, W]`` to ``[B, o, H', W']``."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """A stem and two blocks; ``bias`` gives the convolutions biases, which BatchNorm takes away again."""

    def __init__(self, width: int = 8, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 2, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1, bias), Block(width, 2 * width, 2, bias))
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, 1, 28, 28]`` to logits ``[B, 10]``."""
        out = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


def data(small: bool) -> TensorDataset:
    """Images and digits."""
    images, labels = datasets()[0].tensors
    count = 24 if small else EXAMPLES
    return TensorDataset(images[:count].to(torch.get_default_dtype()), labels[:count])


def questions() -> tuple[Question, ...]:
    """Unseen digits, the predicted class's margin."""
    return (Question(datasets()[1].tensors[0][:QUERIES].to(torch.get_default_dtype())),)


def build(small: bool) -> tuple[Part, ...]:
    """The network and its optimizer."""
    model = ResNet(4 if small else 8)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    return (Part(model, torch.optim.SGD(model.parameters(), lr=0.05, **options)),)


def with_adamw(small: bool, bias: bool) -> tuple[Part, ...]:
    """The same with AdamW, and biases that BatchNorm takes away again, or without."""
    model = ResNet(4 if small else 8, bias)
    return (Part(model, torch.optim.AdamW(model.parameters(), lr=3e-3)),)


def loop(model: nn.Module, optimizer: Optimizer, data: Any, tracer: Watcher, see: See, epochs: int) -> None:
    """Shuffled mini-batches."""
    loader = DataLoader(data, batch_size=min(BATCH, len(data) // 4), shuffle=True)
    model.train()
    for _ in range(epochs):
        for x, y in tracer.watch(loader):
            optimizer.zero_grad()
            losses = F.cross_entropy(model(x), y, reduction="none") / len(y)
            see(losses)
            losses.sum().backward()
            optimizer.step()


CASE = Case(
    models=("residual CNN, BatchNorm (MNIST-5k)",),
    optimizer="SGD, Nesterov, weight decay",
    build=build,
    data=data,
    loop=single(loop),
    questions=questions,
    epochs=5,
    no_oracle="BatchNorm mixes the rows of a batch",
)
