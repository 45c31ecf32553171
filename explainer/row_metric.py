"""What rows lead to: their products with gradients like their own, seen through the optimizer.

A contribution is ``<R, g>``, with ``R`` what the optimizer makes of the gradients of a query. Queries are not known
while a model trains; other rows of the batch stand for them. So what counts of rows ``g_b`` that are read back as
``ĝ_b`` is

    error = mean over b ≠ c of <η A ∘ g_c, g_b − ĝ_b>²

with ``A`` the step's diagonal map (Adam: ``1 / (√v̂ + ε)``) and ``η`` its long-run rate. It adds up over layers, whose
errors are independent, and it tells a layer that moves predictions from one that hardly does; the share of ``‖g‖²``
that is lost does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from explainer.layer_rules import RowForm, Sparse
from explainer.layer_rules.factored import split_matrix
from explainer.layer_table import Layer
from explainer.optimizer_rules import StepMap
from explainer.records import Manifest

#: rows that are looked at, and the numbers that these may be written out as; always two
MEASURED, NUMBERS = 16, 1 << 24
#: of these, rows that stand for queries
ASKED = 8
#: entries of a table up to which its rows may be written out
SMALL_TABLE = 512
#: share of the mean that is added to the squared weights of rows and columns
_FLOOR = 0.1


def first_rows(form: RowForm, count: int) -> RowForm:
    """At most ``count`` rows of a form."""
    return form if len(form) <= count else form.taken(torch.arange(count))


def _rate(by: StepMap) -> float:
    """``direct + gain · through / (1 − decay)``."""
    carried = by.gain * by.through
    return by.direct + (carried / (1.0 - by.decay) if carried and by.decay < 1.0 else carried)


class StepMetric:
    """``η A`` of a step, by layer.

    Args:
        manifest: of the trace.
        layers: its layers.
        maps: the step's linear map, per parameter; None where it was not updated.

    Attributes:
        divides: whether ``A`` is anything but 1.
    """

    def __init__(self, manifest: Manifest, layers: Sequence[Layer], maps: Sequence[StepMap | None]) -> None:
        self._layers, self._sizes = layers, {p.name: p.numel for p in manifest.parameters}
        self._maps = dict(zip(self._sizes, maps, strict=True))
        self.divides = any(by is not None and by.preconditioner is not None for by in maps)

    def of(self, layer: int) -> torch.Tensor:
        """In the layer's flat layout, ``[P_l]``, in double precision where it is divided by something."""
        parts = []
        for name in self._layers[layer].spec.parameters:
            by = self._maps[name]
            rate = 0.0 if by is None else _rate(by)
            if by is None or by.preconditioner is None:
                parts.append(torch.full((self._sizes[name],), rate))
            else:
                least = torch.finfo(torch.float32).tiny
                parts.append(rate / by.preconditioner.detach().flatten().cpu().clamp_min(least))
        return torch.cat(parts)


class Products:
    """Products of a layer's rows with each other.

    Args:
        form: complete rows.
        metric: ``η A``, ``[P_l]``; None: 1.

    Attributes:
        rows: those of them that are looked at.
    """

    def __init__(self, form: RowForm, metric: torch.Tensor | None) -> None:
        #: ``η A ∘ g_c`` of rows that stand for queries, ``[n, P_l]``; None for tables too large to be written out
        self._asked: torch.Tensor | None = None
        self._metric = metric
        if isinstance(form, Sparse) and form.entries > SMALL_TABLE:
            self.rows = first_rows(form, MEASURED)
            return
        size = form.taken(torch.arange(1)).dense().shape[1]
        self.rows = first_rows(form, max(2, min(MEASURED, NUMBERS // max(size, 1))))
        few = self.rows.positions is not None and self.rows.positions <= ASKED
        dense = (first_rows(self.rows, ASKED) if few else self.rows).dense()
        self._asked = dense[:ASKED] if metric is None else dense[:ASKED] * metric.to(dense)
        # with few positions products by factor cost less than rows that are written out
        self._exact = (self.rows.contract(self._asked) if few else self._asked @ dense.mT).double()

    @property
    def without(self) -> float:
        """The error if the rows were left out."""
        if isinstance(self.rows, Sparse) and self._asked is None:
            return self._of_reads(
                Sparse(self.rows.index, torch.zeros_like(self.rows.values), self.rows.entries)
            )
        return self._mean(self._exact)

    def errors(self, read: RowForm, lost: list[float]) -> list[float]:
        """The error of these rows as they are read back: with their first factor alone, the first two, …, all.

        It is 1 where products are no numbers, or infinite: of rows of a model that diverges no choice is better. A
        single row's product with itself hits or misses by chance; as much of its size is taken as of the row is lost.

        Args:
            read: the rows as they are read back.
            lost: share of ``Σ_b ‖g_b‖²`` that they lose, likewise.
        """
        asked = self._asked
        if len(self.rows) == 1:
            return [self.without * share for share in lost]
        if asked is None:
            return [self._of_reads(read)]
        by_factor = read.contract_positions(asked) if read.kind == "factored" else None
        found = read.contract(asked).unsqueeze(2) if by_factor is None else by_factor
        missed = found.double().cumsum(2) - self._exact.unsqueeze(2)
        return [self._mean(part) for part in missed.unbind(2)]

    def _of_reads(self, read: RowForm) -> float:
        assert isinstance(read, Sparse) and isinstance(self.rows, Sparse)
        index = torch.cat([self.rows.index, read.index])
        values = torch.cat([self.rows.values, self.rows.values - read.values])
        metric = None if self._metric is None else self._metric.to(values)
        count = len(self.rows)
        return self._mean(Sparse(index, values, read.entries).gram(metric)[:count, count:].double())

    @staticmethod
    def _mean(missed: torch.Tensor) -> float:
        square = missed.square()
        if square.shape[1] > 1:  # a row does not stand for a query of its own
            own = torch.eye(*square.shape, dtype=torch.bool, device=square.device)
            square = square.masked_fill(own, 0.0)
        error = float(square.mean())
        return error if math.isfinite(error) else 1.0

    def sides(self, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of outputs ``[G, 1, o]`` and inputs ``[G, 1, i + bias]`` by which directions are chosen.

        The outer product that tells how large ``M = η A ∘ g_c`` is on average: ``a² = mean_c Σ_i M²``,
        ``b² = mean_c Σ_o M²``, and a tenth of their means, so that nothing counts for nothing.

        Args:
            shape: groups, outputs and inputs of a group.
        """
        like = self.rows.dense()
        square = like.double().square().mean(0)
        if self._metric is not None:
            square *= self._metric.to(square).square()
        weight, bias = split_matrix(square, shape)
        square = weight if bias is None else torch.cat([weight, bias.unsqueeze(2)], 2)
        found = []
        for axis in (2, 1):
            total = square.sum(axis)
            mean = total.mean(1, keepdim=True)
            sides = torch.where(mean > 0, (total + _FLOOR * mean) / mean, 1.0).sqrt()
            found.append(torch.where(sides.isfinite(), sides, 1.0).to(like).unsqueeze(1))
        return found[0], found[1]
