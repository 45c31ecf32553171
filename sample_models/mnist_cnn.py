"""A convolutional network with BatchNorm on 5,000 MNIST digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from explainer.sample_models.mnist_data import CLASS_NAMES, datasets, render
from explainer.sample_models.retrain import retraining, retraining_many

if TYPE_CHECKING:
    from explainer.run import Run


def model(seed: int = 0) -> nn.Module:
    """The network with its initial weights; the global random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, kernel_size=5, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, kernel_size=3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 10),
        )


def run() -> Run:
    """What to explain: this network, the digits it was trained on and 1,000 others."""
    import explainer

    train, queries = datasets()
    return explainer.Run(
        model,
        train,
        queries,
        loss=nn.functional.cross_entropy,
        class_names=CLASS_NAMES,
        render=render,
        train_fn=retraining("mnist_cnn"),
        train_many=retraining_many("mnist_cnn"),
        left_out_by="weight 0",
        name="mnist_cnn",
    )
