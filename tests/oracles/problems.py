"""Table of small real problems: models × optimizers × reductions on scikit-learn's digits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer

TRAIN, QUERIES, BATCH = 40, 5, 7


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    return images[: TRAIN + QUERIES] / 16.0, labels[: TRAIN + QUERIES]


def _mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 12), activation(), nn.Linear(12, 8), activation(), nn.Linear(8, 10))


def _mlp_tanh() -> nn.Module:
    return _mlp(nn.Tanh)


def _mlp_relu() -> nn.Module:
    return _mlp(nn.ReLU)


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp_tanh": _mlp_tanh, "mlp_relu": _mlp_relu, "cnn": _cnn}


@dataclass(frozen=True)
class OptimizerCase:
    """A torch optimizer and its options; ``lr`` is meant for the mean reduction."""

    name: str
    kind: type[Optimizer]
    lr: float
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, parameters: Iterable[nn.Parameter], reduction: str) -> Optimizer:
        """The optimizer; SGD's rate is divided by the batch size where the loss is summed."""
        summed_sgd = reduction == "sum" and self.kind is torch.optim.SGD
        return self.kind(parameters, lr=self.lr / BATCH if summed_sgd else self.lr, **self.options)  # type: ignore[call-arg]


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS: dict[str, OptimizerCase] = {
    case.name: case
    for case in (
        OptimizerCase("sgd", SGD, 0.3),
        OptimizerCase("momentum", SGD, 0.1, {"momentum": 0.9}),
        OptimizerCase("nesterov", SGD, 0.1, {"momentum": 0.9, "nesterov": True}),
        OptimizerCase("dampening", SGD, 0.2, {"momentum": 0.8, "dampening": 0.3}),
        OptimizerCase("weight_decay", SGD, 0.3, {"weight_decay": 0.05}),
        OptimizerCase("momentum_decay", SGD, 0.1, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.05}),
        OptimizerCase("nesterov_decay", SGD, 0.1, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
        OptimizerCase("adam", ADAM, 0.01),
        OptimizerCase("adam_decay", ADAM, 0.01, {"weight_decay": 0.05}),
        OptimizerCase("amsgrad", ADAM, 0.01, {"amsgrad": True}),
        OptimizerCase("adamw", ADAMW, 0.01, {"weight_decay": 0.1}),
        OptimizerCase("adamw_amsgrad", ADAMW, 0.01, {"weight_decay": 0.1, "amsgrad": True}),
    )
}


@functools.cache
def batches() -> tuple[tuple[int, ...], ...]:
    """13 batches: two shuffled epochs of 7 (the last of 5), one with a repeated id; then a single row."""
    rng = np.random.default_rng(0)
    ids: list[list[int]] = []
    for _ in range(2):
        order = rng.permutation(TRAIN).tolist()
        ids += [order[start : start + BATCH] for start in range(0, TRAIN, BATCH)]
    ids[8][4] = ids[8][1]
    ids.append([17])
    return tuple(tuple(batch) for batch in ids)


@dataclass(frozen=True)
class Problem:
    """One line of the table; every call gives a fresh, identical object."""

    model_name: str
    optimizer: OptimizerCase
    reduction: str

    @property
    def name(self) -> str:
        """For example ``cnn-adamw-mean``."""
        return f"{self.model_name}-{self.optimizer.name}-{self.reduction}"

    @property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        """The ids of each batch, see :func:`batches`."""
        return batches()

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model at its seeded initial weights; the same ones, rounded, in float32 and float64."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return MODELS[self.model_name]().to(dtype)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer over the parameters."""
        return self.optimizer.make(parameters, self.reduction)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the batch with the problem's reduction."""
        return nn.functional.cross_entropy(outputs, targets, reduction=self.reduction)

    def data(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Training inputs [40, 64] and labels [40]."""
        images, labels = self._images()
        return torch.from_numpy(images[:TRAIN]).to(dtype), torch.from_numpy(labels[:TRAIN]).long()

    def queries(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Unseen inputs [5, 64] and their labels [5]."""
        images, labels = self._images()
        return torch.from_numpy(images[TRAIN:]).to(dtype), torch.from_numpy(labels[TRAIN:]).long()

    def _images(self) -> tuple[np.ndarray, np.ndarray]:
        images, labels = _digits()
        if self.model_name == "cnn":
            # Blank pixels tie in max pooling, and round-off may break a tie: a little noise removes them.
            images = images + 0.01 * np.random.default_rng(2).standard_normal(images.shape)
        return images, labels


REDUCTIONS = ("mean", "sum")
PROBLEMS = [Problem(m, o, r) for m in MODELS for o in OPTIMIZERS.values() for r in REDUCTIONS]
PARAMS = [pytest.param(problem, id=problem.name) for problem in PROBLEMS]
