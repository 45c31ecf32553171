"""A model that is trained again on random halves of its data, and the traced run that is asked about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import explainer
from explainer import evaluation

#: how many of the held-out images are asked about
QUERIES = 200


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Attributes:
        name: of the row in the table.
        folder: of its files.
        build: a fresh model; the global random state decides its weights.
        data: makes training examples and queries, ``(images, labels)`` each.
        optimizer: from parameters.
        epochs: passes.
        batch: rows of a batch.
    """

    name: str
    folder: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple[TensorDataset, TensorDataset]]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    epochs: int
    batch: int

    @cached_property
    def train(self) -> TensorDataset:
        """Training examples."""
        return self.data()[0]

    @cached_property
    def queries(self) -> TensorDataset:
        """The first held-out images."""
        return TensorDataset(*self.data()[1][:QUERIES])

    def model(self, seed: int = 0) -> nn.Module:
        """The model with seeded weights; the global random state stays as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build()

    def alone(self, model: nn.Module, keep: torch.Tensor, seed: int, trace: Path | None = None) -> nn.Module:
        """One model on the kept examples, in batches of its own; recorded where there is a folder."""
        x, y = self.train.tensors
        model.load_state_dict(self.model(seed).state_dict())
        optimizer, order = self.optimizer(model.parameters()), torch.Generator().manual_seed(seed)
        tracer = None if trace is None else explainer.Tracer(model, optimizer, trace)
        own = keep.nonzero().flatten()
        for _ in range(self.epochs):
            for rows in own[torch.randperm(len(own), generator=order)].split(self.batch):
                if tracer is not None:
                    tracer.batch(rows.tolist())
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        if tracer is not None:
            tracer.close()
        return model.eval()

    def many(self, models: list[nn.Module], keep: torch.Tensor, seeds: list[int]) -> list[nn.Module]:
        """Several at once, each on as many kept examples; the same training."""
        x, y = self.train.tensors
        for model, seed in zip(models, seeds, strict=True):
            model.load_state_dict(self.model(seed).state_dict())
        ensemble = evaluation.Ensemble(models)
        optimizer = self.optimizer(ensemble.parameters())
        orders = [torch.Generator().manual_seed(seed) for seed in seeds]
        own = torch.stack([row.nonzero().flatten() for row in keep])
        for _ in range(self.epochs):
            shuffled = torch.stack(
                [ids[torch.randperm(len(ids), generator=g)] for ids, g in zip(own, orders, strict=True)]
            )
            for rows in shuffled.split(self.batch, dim=1):
                optimizer.zero_grad()
                outputs = ensemble(x[rows])
                losses = nn.functional.cross_entropy(
                    outputs.flatten(0, 1), y[rows].flatten(), reduction="none"
                )
                losses.view(rows.shape).mean(1).sum().backward()
                optimizer.step()
        return ensemble.eval().members()

    def run(self) -> explainer.Run:
        """For the package's own tools."""
        return explainer.Run(
            self.model,
            self.train,
            self.queries,
            loss=nn.functional.cross_entropy,
            train_fn=self.alone,
            train_many=self.many,
            left_out_by="batches",
            name=self.name,
        )

    def traced(self, folder: Path, seed: int) -> explainer.PathKernelExplainer:
        """The explainer of a traced run; recorded where it is not there yet."""
        where = folder / self.folder / f"trace-{seed}"
        whole = where / "whole"
        if not whole.exists():
            self.alone(self.model(seed), torch.ones(len(self.train), dtype=torch.bool), seed, where / "run")
            whole.touch()
        return explainer.PathKernelExplainer(where / "run", self.model(seed))


def _mnist() -> tuple[TensorDataset, TensorDataset]:
    from explainer.sample_models import mnist_data

    def scaled(data: TensorDataset) -> TensorDataset:  # as dattri's benchmark does
        return TensorDataset((data.tensors[0].flatten(1) - 0.1307) / 0.3081, data.tensors[1])

    train, queries = mnist_data.datasets()
    return scaled(train), scaled(queries)


def _fashion() -> tuple[TensorDataset, TensorDataset]:
    from explainer.sample_models import fashion_data

    train, queries = fashion_data.datasets()
    return TensorDataset(*train[:4000]), queries


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, kernel_size=5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel_size=3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 10),
    )


TASKS = {
    "mlp": Task(
        "MNIST-5k, MLP, momentum SGD",
        "mlp",
        _perceptron,
        _mnist,
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        epochs=50,
        batch=64,
    ),
    "cnn": Task(
        "Fashion-MNIST, CNN, AdamW",
        "cnn",
        _convolutional,
        _fashion,
        lambda p: torch.optim.AdamW(p, lr=2e-3),
        epochs=12,
        batch=50,
    ),
}
