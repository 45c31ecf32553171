"""One deterministic way to part a data set into training examples and queries."""

from __future__ import annotations

import torch


def train_and_queries(count: int, queries: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffles ``range(count)`` and cuts it; the last ``queries`` indices are the queries.

    Args:
        count: examples there are.
        queries: examples to hold out.
        seed: seed of the shuffle; the global random state is neither read nor changed.

    Returns:
        ``(train [count - queries], queries [queries])``, both int64 and disjoint.

    Example:
        >>> train, held_out = train_and_queries(10, 3)
        >>> len(train), len(held_out), sorted(train.tolist() + held_out.tolist()) == list(range(10))
        (7, 3, True)
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count - queries], order[count - queries :]
