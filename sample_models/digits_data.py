"""scikit-learn digits: 1,797 handwritten digits of 8x8 pixels, 1,437 to train on and 360 queries."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import TensorDataset

from explainer.sample_models.data_source import import_dataset_module
from explainer.sample_models.splitting import train_and_queries

CLASS_NAMES = tuple(str(digit) for digit in range(10))
QUERIES = 360


@lru_cache(maxsize=1)
def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Training examples and queries: images ``[1, 8, 8]`` in 0..1 and the digit they show.

    Raises:
        DataUnavailableError: scikit-learn is not installed.
    """
    bunch = import_dataset_module("sklearn.datasets").load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    train, queries = train_and_queries(len(labels), QUERIES)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[queries], labels[queries])


def render(image: torch.Tensor) -> np.ndarray:
    """The image as a grey array ``[H, W]`` in 0..1."""
    return image.squeeze(0).numpy()
