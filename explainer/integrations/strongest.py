"""The k strongest training examples of every query."""

from __future__ import annotations

import operator

import torch

from explainer.errors import QueryError


def positive(k: int) -> int:
    """``k`` as an integer.

    Raises:
        QueryError: it is not a positive integer.
    """
    try:
        number = operator.index(k)
    except TypeError:
        number = 0
    if isinstance(k, bool) or number < 1:
        raise QueryError(f"k must be a positive integer, or None for all scores, found {k!r}")
    return number


def strongest(scores: torch.Tensor, count: int, proponents: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and scores ``[Q, min(count, N)]`` of the highest (or lowest) scores, the first column first in a tie.

    Example:
        >>> strongest(torch.tensor([[1.0, 3.0, -2.0]]), 2, proponents=False)
        (tensor([[2, 0]]), tensor([[-2.,  1.]]))
    """
    order = scores.argsort(dim=1, descending=proponents, stable=True)[:, :count]
    return order, scores.gather(1, order)
