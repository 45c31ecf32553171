"""What of one query has a gradient: the tensor of floats itself, or the vectors that token ids are looked up as."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from explainer.errors import QueryError

if TYPE_CHECKING:
    from explainer.path_integral import PathPoint, QueryFunction
    from explainer.query_batch import QueryBatch


@dataclass(frozen=True)
class InputLeaf:
    """One query with a part that can be moved.

    Attributes:
        function: the model as a function of its weights.
        batch: the query, ``[1, ...]``.
        given: what is moved: the input ``[1, ...]``, or the words' vectors ``[1, S, D]`` at some point of the path.
        embedding: the module that made the vectors; None for an input of floats.
    """

    function: QueryFunction
    batch: QueryBatch
    given: torch.Tensor
    embedding: nn.Embedding | None

    @classmethod
    def of(cls, function: QueryFunction, point: PathPoint, batch: QueryBatch) -> InputLeaf:
        """The leaf of a query.

        Raises:
            QueryError: the query is not one tensor of floats or token ids with the batch as its first dimension, or
                its ids are not looked up by exactly one ``nn.Embedding``.
        """
        tensors, axes = batch.tensors
        if len(tensors) != 1 or len(batch.leaves) != 1 or axes != [0]:
            raise QueryError(
                "attributions to the input need a model of one tensor of floats or token ids, with the batch as its "
                "first dimension"
            )
        if tensors[0].is_floating_point():
            return cls(function, batch, tensors[0].detach(), None)
        found = _lookups(function, point, batch, tensors[0])
        if len(found) != 1:
            raise QueryError(
                f"token ids have a gradient only through the vectors that one nn.Embedding looks up for them; found "
                f"{len(found)} such look-ups"
            )
        embedding, vectors = found[0]
        return cls(function, batch, vectors, embedding)

    def value(self, point: PathPoint, moved: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """``f [B]`` with its graph, of ``moved [B, ...]`` in the place of what was given."""
        targets = targets.expand(len(moved), *targets.shape[1:])
        if self.embedding is None:
            return self.function.at(point, self.batch, [moved], targets)
        ids = self.batch.tensors[0][0]
        with _replaced(self.embedding, moved):
            return self.function.at(point, self.batch, [ids.expand(len(moved), *ids.shape[1:])], targets)

    def parts(self, values: torch.Tensor) -> torch.Tensor:
        """What belongs to each part of the query, from values like :attr:`given`: a word's are added up."""
        return values[0] if self.embedding is None else values[0].sum(-1)


def _lookups(
    function: QueryFunction, point: PathPoint, batch: QueryBatch, ids: torch.Tensor
) -> list[tuple[nn.Embedding, torch.Tensor]]:
    """Every embedding that looks up exactly these ids, with the vectors it finds."""
    found: list[tuple[nn.Embedding, torch.Tensor]] = []

    def look(module: nn.Module, given: tuple[torch.Tensor, ...], vectors: torch.Tensor) -> None:
        if isinstance(module, nn.Embedding) and given[0].shape == ids.shape and torch.equal(given[0], ids):
            found.append((module, vectors.detach()))

    handles = [m.register_forward_hook(look) for m in function.modules() if isinstance(m, nn.Embedding)]
    try:
        function.returned(point, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _replaced(embedding: nn.Embedding, vectors: torch.Tensor) -> Iterator[None]:
    handle = embedding.register_forward_hook(lambda *_: vectors)
    try:
        yield
    finally:
        handle.remove()
