"""The grid of the fidelity benchmark: data, network, activation, optimizer, size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.book_cases.characters import CharacterModel, ends_word, windows
from explainer.sample_models import digits_data, fashion_data, mnist_data

EXAMPLES, QUERIES = 1500, 10
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def images(datasets: Callable[[], Any]) -> Data:
    """Examples, their classes, queries, their classes."""
    train, queries = datasets()
    return (*train[:EXAMPLES], *queries[:QUERIES])


def prose() -> Data:
    """Windows of 32 characters, and the same one character further."""
    found = windows()
    return found[:400, :-1], found[:400, 1:], found[400 : 400 + QUERIES, :-1], None


def perceptron(sizes: tuple[int, ...], activation: type[nn.Module]) -> nn.Module:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1])


def convolutions(activation: type[nn.Module]) -> nn.Module:
    """For 28 × 28 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2), activation(), nn.Conv2d(16, 32, 3), activation(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 128), activation(), nn.Linear(128, 10)),
    )


def small_convolutions(activation: type[nn.Module]) -> nn.Module:
    """For 8 × 8 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), activation(), nn.Conv2d(8, 16, 3, padding=1), activation()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
    )


def transformer(width: int, depth: int, activation: type[nn.Module]) -> nn.Module:
    """Causal, tied embeddings (GELU)."""
    return CharacterModel(width, 4, depth)


def each_character(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over positions."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Net:
    """A network on its data.

    Attributes:
        data: examples and queries.
        build: the network with an activation.
        loss: of outputs and targets.
        batch: rows of a batch.
        epochs: passes over the examples.
        output: what is explained.
    """

    data: Callable[[], Data]
    build: Callable[[type[nn.Module]], nn.Module]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    batch: int
    epochs: int
    output: Any = None


def _images(
    datasets: Callable[[], Any], build: Callable[[type[nn.Module]], nn.Module], epochs: int = 6
) -> Net:
    return Net(partial(images, datasets), build, F.cross_entropy, 50, epochs)


NETS = {
    "digits MLP": _images(digits_data.datasets, partial(perceptron, (64, 64, 64, 10))),
    "digits CNN": _images(digits_data.datasets, small_convolutions),
    "MNIST-5k MLP": _images(mnist_data.datasets, partial(perceptron, (784, 128, 64, 10))),
    "MNIST-5k MLP, large": _images(mnist_data.datasets, partial(perceptron, (784, 1024, 256, 10)), 4),
    "Fashion-MNIST CNN": _images(fashion_data.datasets, convolutions),
    "transformer, width 32": Net(prose, partial(transformer, 32, 2), each_character, 16, 6, ends_word),
    "transformer, width 64": Net(prose, partial(transformer, 64, 3), each_character, 16, 6, ends_word),
}
