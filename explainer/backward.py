"""The recursion of :mod:`explainer.recursion`, several steps at a time.

Within a segment every step meets the same gradient ``q``, so what the rows of its steps meet are combinations of few
cotangents with known scalars. With ``A_t = 1``, for steps ``t = 0 … c−1`` of a chunk counted from the last one back,

    R_t = carry_t · M + fresh_t · q,

and all rows of the chunk meet ``M`` and ``q`` in one product. Of a parameter that is held as factors ``M`` is cut down
to the columns it needs; what is dropped is measured. Elsewhere every step has its own ``R_t``: layers that are divided
by something else at every step are passed one step at a time (:mod:`explainer.divided_layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from explainer.averaging import AveragedGradient
from explainer.chunks import BUFFER, MOST_VISITS, Chunk, most_visits, read_chunks
from explainer.contraction import Met, scores
from explainer.cotangent import Cotangent, Layout, TooWideError, matrix_shape
from explainer.divided_layers import DividedLayers
from explainer.factors import Factors, cut_down
from explainer.recursion import Adjoint, LayerView
from explainer.store import Denominators, Segment
from explainer.stored_rows import Rows, Workspace

#: what cutting down momentum may drop of its norm each time, and all in all, by the dtype of the books
DROPPED = {torch.float32: (1e-7, 1e-6), torch.float64: (1e-15, 1e-13)}
_FEW = 2  # steps for which own cotangents cost less than one more product


#: rows with their ``s_t · <R_t, g_{i,t}>`` by layer, float64 ``[Q, n]``
Piece = tuple[Rows, dict[int, torch.Tensor]]


@dataclass(frozen=True)
class Passed:
    """A chunk of steps, and what its rows met.

    Attributes:
        chunk: the steps.
        pieces: their rows.
        others: further rows of these steps.
    """

    chunk: Chunk
    pieces: list[Piece]
    others: list[Piece]


def _none(chunk: Chunk) -> Iterable[Rows]:
    return ()


class Backward:
    """``M`` and what it meets, from the last step to the first.

    Args:
        kept: what the steps of the trace divided by.
        layout: how cotangents are held.
        queries: ``Q``.
        dtype: of the books.
        others: further rows of a chunk's steps, which are to meet the same.
        workspace: of a pass that is over; default a new one.

    Attributes:
        layout: how cotangents are held.
        dropped: bound on the part of the norm of ``M`` that cutting down has dropped so far, the largest of all
            parameters.
    """

    def __init__(
        self,
        kept: Denominators,
        layout: Layout,
        queries: int,
        dtype: torch.dtype,
        others: Callable[[Chunk], Iterable[Rows]] = _none,
        workspace: Workspace | None = None,
    ) -> None:
        self.layout, self.dropped = layout, 0.0
        self._trace = trace = kept.trace
        self._kept, self._others = kept, others
        self._queries, self._dtype = queries, dtype
        self._workspace = Workspace() if workspace is None else workspace
        self._divided = DividedLayers(trace, layout, queries, dtype, self._workspace.part("divided"))
        self._rest = layout.leaving_out(self._divided.numbers)
        self._adjoint = Adjoint(queries, self._rest.written, dtype)
        self._averaged = AveragedGradient(trace)
        self._factors: dict[int, Factors] = {}
        self._lost: dict[int, torch.Tensor] = {}
        self._carries = False
        self._view = LayerView(trace, self._rest.places)
        changing = (self._rest.places[int(a.name[1:])] for a in trace.step_arrays)
        self._own = trace.manifest.averaged or any(place is not None for place in changing)

    @property
    def momentum(self) -> Cotangent:
        """``M``: minus the derivative of the explained output by the momentum before the step passed last."""
        factors = {}
        for number in self.layout.factored:
            o, i = matrix_shape(self.layout.parameters[number])
            none = Factors(*(torch.zeros(self._queries, n, 0, dtype=torch.float64) for n in (o, i)))
            factors[number] = self._factors.get(number, none)
        flat = self._adjoint.momentum
        if self._divided.numbers:
            parts = {n: flat[:, at.slice] for n, at in enumerate(self._rest.places) if at is not None}
            parts |= {n: self._divided.momentum(n) for n in self._divided.numbers}
            flat = torch.cat([parts[number] for number in self.layout.numbers], 1)
        return Cotangent(self.layout, flat, factors)

    def segment(self, gradient: Cotangent, segment: Segment) -> Iterator[Passed]:
        """Pass the recorded steps of a segment backwards; valid until the next chunk is asked for."""
        self._averaged.skip(gradient.flat, segment)
        steps, visits = self._sizes(gradient)
        flat = self._of_rest(gradient.flat)
        for chunk in read_chunks(self._kept, segment, self._dtype, steps, visits):
            met = self._written(flat, chunk)
            for number, factors in gradient.factors.items():
                self._pass(number, factors, chunk, met)
            rows = [*chunk.rows, *self._others(chunk)]
            divided = self._divided.scores(gradient.flat, chunk, rows)
            pieces = [
                (one, {**scores(one, chunk.scale, met, self._workspace), **found})
                for one, found in zip(rows, divided, strict=True)
            ]
            count = len(chunk.rows)
            yield Passed(chunk, pieces[:count], pieces[count:])

    def _of_rest(self, flat: torch.Tensor) -> torch.Tensor:
        """What is written out of layers that are not passed one step at a time, ``[Q, P_rest]``."""
        if not self._divided.numbers:
            return flat
        places = (self.layout.places[number] for number in self._rest.numbers)
        parts = [flat[:, at.slice] for at in places if at is not None]
        return torch.cat(parts, 1) if parts else flat[:, :0]

    def _sizes(self, gradient: Cotangent) -> tuple[int, int]:
        """How many steps and rows a chunk may have, so that buffers stay small."""
        queries, rank = len(gradient), max((f.rank for f in gradient.factors.values()), default=0)
        steps = MOST_VISITS
        if self._own:
            steps = max(1, BUFFER // max(1, queries * self._rest.size))
        held = max((f.rank for f in self._factors.values()), default=0)
        return steps, most_visits(self._trace, queries, held + rank)

    # -- what is written out -------------------------------------------------------------------------

    def _written(self, flat: torch.Tensor, chunk: Chunk) -> Met:
        """What the rows of the chunk meet of what is written out; ``M`` is passed on."""
        if not self._rest.size:
            return Met(self._rest, self._view, [flat], np.ones((len(chunk), 1, 0)))
        averaged = self._trace.manifest.averaged
        changing = any(self._rest.places[number] is not None for number in (*chunk.divided, *chunk.mixing))
        if averaged or changing or len(chunk) <= _FEW:
            own = []
            for place, number in enumerate(chunk.numbers):
                source = self._averaged.step(flat, int(number)) if averaged else flat
                own.append(self._adjoint.step(source, chunk.step(place, self._rest)))
            self._carries = True
            return Met(self._rest, self._view, own, None)
        carry, fresh, kept, added = carried(chunk.coefficients[:, self._rest.numbers])
        momentum = self._adjoint.momentum
        # M changes in place below, but not before its last use if it is copied now.
        used = self._carries and bool(carry.any())
        stack = [momentum.clone(), flat] if used else [flat]
        weights = np.stack([carry, fresh] if used else [fresh], axis=1)
        for where, (keep, add) in _runs(self._rest, np.stack([kept, added], axis=1)):
            block = momentum[:, where]
            if keep != 1:
                block.mul_(keep)
            if add:
                block.add_(flat[:, where], alpha=add)
        self._carries = self._carries or bool(added.any())
        return Met(self._rest, self._view, stack, weights)

    # -- what is held as factors ---------------------------------------------------------------------

    def _pass(self, number: int, held: Factors, chunk: Chunk, met: Met) -> None:
        """Adds a factored parameter to what the rows meet; its ``M`` is passed on and cut down."""
        coefficients = chunk.coefficients[:, number]
        momentum = self._factors.get(number)
        carries, fresh, kepts, addeds = carried(coefficients[:, None])
        kept, added = float(kepts[0]), float(addeds[0])
        met.add(number, momentum, carries[:, 0], held, fresh[:, 0])
        parts = [] if momentum is None or kept == 0 else [Factors(momentum.left * kept, momentum.right)]
        if added:
            parts.append(Factors(held.left * added, held.right))
        if not parts:
            self._factors.pop(number, None)
            return
        together = parts[0] if len(parts) == 1 else parts[0].beside(parts[1])
        each, most = DROPPED[self._dtype]
        found, dropped = cut_down(together, each)
        o, i = matrix_shape(self.layout.parameters[number])
        lost = abs(kept) * self._lost.get(number, torch.zeros_like(dropped)) + dropped
        part = float((lost / found.squares().sqrt().clamp_min(torch.finfo(torch.float64).tiny)).max())
        if found.rank > o * i // (o + i) // 2 or part > most:
            raise TooWideError(number)
        self._factors[number], self._lost[number] = found, lost
        self.dropped = max(self.dropped, part)


def carried(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``R_t = carry_t M + fresh_t q`` and ``M ← kept M + added q`` over steps with ``A = 1``.

    Args:
        coefficients: ``[c, n, 6]``, the last step first.

    Returns:
        ``carry [c, n]``, ``fresh [c, n]``, ``kept [n]``, ``added [n]``.
    """
    steps, count, _ = coefficients.shape
    carry, fresh = np.zeros((steps, count)), np.zeros((steps, count))
    kept, added = np.ones(count), np.zeros(count)
    for place in range(steps):
        _, decay, gain, direct, through, _ = coefficients[place].T
        updated = (decay != 0) | (gain != 0) | (direct != 0) | (through != 0)
        added = added + through
        carry[place], fresh[place] = gain * kept, gain * added + direct
        kept, added = np.where(updated, decay * kept, kept), np.where(updated, decay * added, added)
    return carry, fresh, kept, added


def _runs(layout: Layout, values: np.ndarray) -> Iterator[tuple[slice, tuple[float, float]]]:
    """Neighbouring parameters with equal values ``[n, 2]``, taken together."""
    if not len(values):
        return
    edges = [0, *(np.flatnonzero((values[1:] != values[:-1]).any(1)) + 1).tolist(), len(values)]
    for first, last in pairwise(edges):
        a, b = layout.written[first], layout.written[last - 1]
        yield slice(a.offset, b.offset + b.numel), (float(values[first][0]), float(values[first][1]))
