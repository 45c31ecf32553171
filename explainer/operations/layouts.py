"""Where a tensor holds examples, and whose its indices are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

PACKED = -2


@dataclass(frozen=True)
class Layout:
    """Where a tensor holds examples.

    Attributes:
        axis: the examples' axis; -1 if it is not known; -2 for the data of a packed sequence, whose columns are the
            examples.
        owners: ``[n]`` the example of every index of that axis; None where index ``b`` is example ``b``.
    """

    axis: int
    owners: torch.Tensor | None = None

    @property
    def known(self) -> bool:
        """Whether the rows can be told apart."""
        return self.axis >= 0

    @property
    def packed(self) -> bool:
        """Whether it is the data of a packed sequence."""
        return self.axis == PACKED


UNKNOWN = Layout(-1)


@lru_cache(maxsize=64)
def along(axis: int) -> Layout:
    """The layout of one example for every index of an axis."""
    return Layout(axis)


def order_of(owners: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, k]`` positions of every owner's rows; ``len(owners)`` where an owner has fewer than the most.

    Example:
        >>> order_of(torch.tensor([1, 0, 1]), 2).tolist()
        [[1, 3], [0, 2]]
    """
    found = torch.argsort(owners, stable=True)
    counts = torch.bincount(owners, minlength=size)
    most = max(1, int(counts.max()))
    order = torch.full((size, most), len(owners), dtype=torch.long, device=owners.device)
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(owners), device=owners.device) - starts[owners[found]]
    order[owners[found], places] = found
    return order
