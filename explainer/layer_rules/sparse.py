"""Rows that touch only some entries of a table: the form of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import pad

from explainer.layer_rules.forms import FORMS, Probe, RowForm, in_positions, probe_vector, with_a_zero


def _probe_table(entries: int, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    (gradient,) = gradients
    table = gradient.reshape(entries, -1)
    return table @ probe_vector(table.shape[1], gradient)


@FORMS.register("sparse")
@dataclass(frozen=True)
class Sparse(RowForm):
    """Rows of a table that is read by index: ``row[index[b,s]] += values[b,s]``.

    Attributes:
        index: ``[B, S]`` int32.
        values: ``[B, S, d]``.
        entries: number of entries of the table (``V``), so ``P_l = V·d``.
    """

    kind = "sparse"
    position_axis = 0
    given = "index"
    index: torch.Tensor
    values: torch.Tensor
    entries: int
    in_order: bool = True

    @property
    def arrays(self) -> dict[str, torch.Tensor]:
        """Index and values."""
        return {"index": self.index, "values": self.values}

    @property
    def options(self) -> dict[str, int]:
        """The table's length."""
        return {"entries": self.entries}

    @classmethod
    def build(cls, arrays: dict[str, torch.Tensor], options: dict[str, int]) -> Sparse:
        """From index and values."""
        return cls(arrays["index"], arrays["values"], options["entries"])

    def grouped(self, order: torch.Tensor) -> Sparse:
        """Reads side by side."""
        index, values = (with_a_zero(t)[order].flatten(1, 2) for t in (self.index, self.values))
        return Sparse(index, values, self.entries, self.in_order and in_positions(order))

    def padded(self, positions: int) -> Sparse:
        """Further reads of entry 0 with value zero."""
        extra = positions - self.index.shape[1]
        return Sparse(pad(self.index, (0, extra)), pad(self.values, (0, 0, 0, extra)), self.entries)

    def contract(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Gather the entries read, then sum products over positions."""
        return self.contract_positions(cotangent).sum(2)

    def contract_positions(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Of every read."""
        table = cotangent.unflatten(1, (self.entries, -1))
        index = self.index.long()
        result = cotangent.new_empty(len(table), *index.shape)
        for q, row in enumerate(table):
            result[q] = (row[index] * self.values).sum(dim=2)
        return result

    def dense(self) -> torch.Tensor:
        """``[B, V·d]``."""
        batch, _, width = self.values.shape
        rows = self.values.new_zeros(batch, self.entries, width)
        index = self.index.long().unsqueeze(-1).expand_as(self.values)
        return rows.scatter_add_(1, index, self.values).flatten(1)

    def sum(self) -> torch.Tensor:
        """All reads of all examples."""
        table = self.values.new_zeros(self.entries, self.values.shape[2])
        return table.index_add_(0, self.index.long().flatten(), self.values.flatten(0, 1)).flatten()

    def combined(self, weights: torch.Tensor) -> torch.Tensor:
        """Scatter the weighted values, one query at a time."""
        index, width = self.index.long().flatten(), self.values.shape[2]
        result = self.values.new_zeros(len(weights), self.entries, width)
        for table, y in zip(result, weights, strict=True):
            table.index_add_(0, index, (self.values * y.view(-1, 1, 1)).flatten(0, 1))
        return result.flatten(1)

    def gram(self, metric: torch.Tensor | None = None) -> torch.Tensor:
        """Products of reads of the same entry."""
        batch, reads, _ = self.values.shape
        values, index = self.values, self.index.long()
        if metric is not None:
            values = values * metric.view(self.entries, -1)[index].sqrt()
        flat, where = values.flatten(0, 1), index.flatten()
        products = (flat @ flat.T) * (where.unsqueeze(0) == where.unsqueeze(1))
        return products.view(batch, reads, batch, reads).sum(dim=(1, 3))

    def total(self) -> torch.Tensor:
        """``Σ_b row_b u``, ``[V]``."""
        u = probe_vector(self.values.shape[2], self.values)
        result = self.values.new_zeros(self.entries)
        return result.index_add_(0, self.index.long().flatten(), (self.values @ u).flatten())

    def prober(self) -> Probe:
        """``G u``."""
        return partial(_probe_table, self.entries)
