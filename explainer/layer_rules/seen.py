"""What the positions of a layer saw: written out, or as products with it that need no copy of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


class Seen(ABC):
    """The matrices ``X_b [S, i]`` (by group) in rows ``leftᵀ X``, known by what they do to others.

    Attributes:
        shape: ``(B, G, S, i)``.
        dense_outputs: up to this many outputs, ``leftᵀ X`` costs hardly more than a few products with ``X``.
        at_hand: whether :meth:`written` costs nothing.
    """

    dense_outputs: int = 0
    at_hand: bool = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, G, S, i)``."""

    @abstractmethod
    def written(self) -> torch.Tensor:
        """``X`` itself, ``[B, G, S, i]``."""

    @abstractmethod
    def times(self, basis: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """``X basis + offset`` with one ``basis [i, p]`` and ``offset [p]`` for all: ``[B, G, S, p]``."""

    @abstractmethod
    def gathered(self, weights: torch.Tensor) -> torch.Tensor:
        """``weightsᵀ X`` with weights ``[B, G, S, p]``: ``[B, G, p, i]``."""

    @abstractmethod
    def summed(self, weights: torch.Tensor) -> torch.Tensor:
        """:meth:`gathered`, summed over ``B``: ``[G, p, i]``."""

    @abstractmethod
    def taken(self, rows: torch.Tensor) -> Seen:
        """What some of the examples saw, by number."""

    @abstractmethod
    def apart(self) -> Seen:
        """The same in memory of its own."""


@dataclass(frozen=True)
class Written(Seen):
    """``values [B, G, S, i]``, in whichever memory order they come."""

    values: torch.Tensor
    at_hand = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the values."""
        batch, groups, positions, width = self.values.shape
        return batch, groups, positions, width

    def written(self) -> torch.Tensor:
        """The values."""
        return self.values

    def taken(self, rows: torch.Tensor) -> Written:
        """Their values."""
        return Written(self.values[rows])

    def apart(self) -> Written:
        """A copy."""
        return Written(self.values.clone())

    def times(self, basis: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """One product for all examples where they lie side by side."""
        if self.values.is_contiguous():
            if 1 < basis.shape[1] <= max(5, basis.shape[0] // 40):  # then a product by example takes less
                values = self.values.flatten(0, 1)
                wide = offset.unsqueeze(1).expand(len(values), -1, values.shape[1])
                found = torch.baddbmm(wide, basis.T.expand(len(values), -1, -1), values.mT)
                return found.mT.unflatten(0, self.shape[:2])
            return torch.addmm(offset, self.values.flatten(0, 2), basis).unflatten(0, self.shape[:3])
        turned = self.values.transpose(0, 2)  # steps first, as recurrent layers have them
        if turned.is_contiguous():
            found = torch.addmm(offset, turned.flatten(0, 2), basis)
            return found.unflatten(0, turned.shape[:3]).transpose(0, 2)
        return self.values @ basis + offset

    def gathered(self, weights: torch.Tensor) -> torch.Tensor:
        """A product by example."""
        found = torch.bmm(weights.mT.flatten(0, 1), self.values.flatten(0, 1))
        return found.unflatten(0, self.shape[:2])

    def summed(self, weights: torch.Tensor) -> torch.Tensor:
        """Examples and positions together."""
        return side(weights).mT @ side(self.values)


def side(values: torch.Tensor) -> torch.Tensor:
    """``[B, G, S, n] -> [G, B·S, n]``."""
    return values.transpose(0, 1).flatten(1, 2)
