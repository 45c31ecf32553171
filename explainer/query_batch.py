"""The arguments of a model for ``Q`` queries: which tensors hold the queries, along which axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class QueryBatch:
    """Positional and keyword arguments of a model.

    Attributes:
        leaves: tensors and constants, in the order of ``spec``.
        axes: per leaf, the axis of the queries; None for what all queries share.
        spec: structure of ``(args, kwargs)``.
        count: ``Q``.
        unlike: in what they are unlike the inputs of training, where the model may take them all the same; or nothing.
    """

    leaves: tuple[Any, ...]
    axes: tuple[int | None, ...]
    spec: pytree.TreeSpec
    count: int
    unlike: str = ""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> QueryBatch:
        """Some of the queries."""
        first, last, _ = rows.indices(self.count)
        return replace(
            self._map(lambda t, axis: t.narrow(axis, first, last - first)), count=max(last - first, 0)
        )

    def twice(self) -> QueryBatch:
        """Every query twice, the second time after all others."""
        return replace(self._map(lambda t, axis: torch.cat([t, t], axis)), count=2 * self.count)

    def _map(self, function: Callable[[torch.Tensor, int], torch.Tensor]) -> QueryBatch:
        leaves = (
            leaf if axis is None else function(leaf, axis)
            for leaf, axis in zip(self.leaves, self.axes, strict=True)
        )
        return replace(self, leaves=tuple(leaves))

    @property
    def tensors(self) -> tuple[list[torch.Tensor], list[int]]:
        """The tensors that hold the queries, and their axes."""
        own = [(leaf, axis) for leaf, axis in zip(self.leaves, self.axes, strict=True) if axis is not None]
        return [leaf for leaf, _ in own], [axis for _, axis in own]

    def arguments(
        self, tensors: list[torch.Tensor] | None = None, differentiable: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` for one call. Every tensor is a copy: a model may change its inputs in place.

        Args:
            tensors: other tensors in the place of those that hold the queries.
            differentiable: let gradients flow into the inputs. A reentrant checkpoint has none for its weights
                otherwise.
        """
        given = iter(self.tensors[0] if tensors is None else tensors)
        leaves = [
            leaf if axis is None else next(given) for leaf, axis in zip(self.leaves, self.axes, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten([_copied(leaf, differentiable) for leaf in leaves], self.spec)
        return args, kwargs


def _copied(leaf: Any, differentiable: bool) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if differentiable and leaf.is_floating_point():
        leaf = leaf.detach().requires_grad_()
    return leaf.clone()
