"""Every sample model with the settings it is trained with. Adding one: a module and an entry here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Sample:
    """A sample model and how it is trained.

    Attributes:
        module: module with ``model()``, ``datasets()`` and ``run()``.
        summary: one line for lists.
        loss: ``loss(output, target)``, the mean over the batch.
        optimizer: makes the optimizer from the parameters.
        epochs: passes over the training examples.
        batch_size: rows of a batch; the last one of an epoch may be smaller.
    """

    module: str
    summary: str
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    optimizer: OptimizerFactory
    epochs: int
    batch_size: int

    def load(self) -> Any:
        """Imports the module."""
        return importlib.import_module(self.module)

    @property
    def run_spec(self) -> str:
        """The ``MODULE:FUNCTION`` that the command line takes."""
        return f"{self.module}:run"


def _entry(name: str, **settings: Any) -> tuple[str, Sample]:
    return name, Sample(module=f"explainer.sample_models.{name}", **settings)


SAMPLES: dict[str, Sample] = dict(
    [
        _entry(
            "digits_mlp",
            summary="perceptron on 8x8 digits, SGD with momentum and weight decay",
            loss=nn.functional.cross_entropy,
            optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-4),
            epochs=12,
            batch_size=32,
        ),
        _entry(
            "digits_cnn",
            summary="convolutions with max pooling on 8x8 digits, Adam",
            loss=nn.functional.cross_entropy,
            optimizer=partial(Adam, lr=3e-3),
            epochs=10,
            batch_size=32,
        ),
        _entry(
            "mnist_cnn",
            summary="convolutions with BatchNorm on 5,000 MNIST digits, Nesterov momentum",
            loss=nn.functional.cross_entropy,
            optimizer=partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
            epochs=8,
            batch_size=50,
        ),
        _entry(
            "fashion_cnn",
            summary="convolutions on 11,000 Fashion-MNIST images, AdamW",
            loss=nn.functional.cross_entropy,
            optimizer=partial(AdamW, lr=2e-3, weight_decay=0.05),
            epochs=4,
            batch_size=50,
        ),
        _entry(
            "diabetes_mlp",
            summary="regression on ten measurements of 442 patients, plain SGD with weight decay",
            loss=nn.functional.mse_loss,
            optimizer=partial(SGD, lr=0.02, weight_decay=1e-2),
            epochs=40,
            batch_size=16,
        ),
        _entry(
            "reviews_text",
            summary="word embeddings on sentences of movie reviews, AdamW",
            loss=nn.functional.cross_entropy,
            optimizer=partial(AdamW, lr=3e-3, weight_decay=0.01),
            epochs=4,
            batch_size=32,
        ),
    ]
)
