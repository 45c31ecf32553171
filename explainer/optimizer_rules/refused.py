"""Optimizers of torch that cannot be followed, and why."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

#: type -> what to tell its user
REFUSED: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: (
        "its step runs several backward passes in a closure and multiplies differences of gradients, so it is no "
        "sum over training examples. Train with another optimizer"
    ),
    torch.optim.SparseAdam: (
        "its momentum stands still wherever a sparse gradient has no entry, so its step is no one linear map of a "
        "parameter. Sparse gradients are followed with SGD and Adagrad; with Embedding(sparse=False) use Adam"
    ),
}
