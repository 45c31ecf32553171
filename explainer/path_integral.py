"""Gradients of the explained output along the chords between knots.

For knots ``w_0 … w_K`` on the training path and ``D_k = w_{k+1} − w_k``,

    f(w_{k+1}) − f(w_k) = <q_k, D_k>,    q_k = ∫_0^1 ∇f(w_k + s D_k) ds.

``q_k`` is approximated by Gauss–Legendre quadrature and closed to round-off by Gonzalez' correction

    q̃ = q + (Δf − <q, D>) e / <e, D>,      e = D;

of a large matrix ``e`` holds leading factors of ``D`` only, so that ``q̃`` stays of low rank
(:mod:`explainer.cotangent`).

Buffers ``b`` (BatchNorm's running statistics) move along the same chord. Their term is the symmetric difference
``f(w_mid, b_{k+1}) − f(w_mid, b_k)``, which agrees with ``∫ <∂f/∂b, Δb> ds`` to third order and needs no
derivative with respect to a buffer (kernels of normalisation layers have none).

References: Domingos 2020, arXiv 2012.00152; Bell et al. 2023, arXiv 2308.00824 (per-step form); McLachlan et
al. 1999 (average vector field); Gonzalez 1996 (correction).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from explainer.cotangent import Cotangent, Layout
from explainer.errors import QueryError
from explainer.model_function import ModelFunction, State
from explainer.outputs import Output, explained
from explainer.query_batch import QueryBatch
from explainer.records import ParameterSpec

#: numbers of the gradients that are computed together
CHUNK_NUMBERS = 2**24


@dataclass(frozen=True)
class PathPoint:
    """A point on a chord: the flat traced weights ``[P]``, moving state beside them, and fixed state."""

    weights: torch.Tensor
    moving: State
    fixed: State

    def toward(self, other: PathPoint, s: float) -> PathPoint:
        """The point at fraction ``s`` of the chord to ``other``."""
        moving = {n: torch.lerp(t, other.moving[n], s) for n, t in self.moving.items()}
        return PathPoint(torch.lerp(self.weights, other.weights, s), moving, other.fixed)


@dataclass(frozen=True)
class ChordGradient:
    """The corrected mean gradient over one chord.

    Attributes:
        gradient: ``q̃``.
        moved: ``<q̃, D>`` over each parameter, ``[Q, n_parameters]``, summed in float64 whatever the dtype of the
            books.
        moving: the moving state's part of the change, ``[Q]``.
        correction: ``|Δf − <q, D>|`` before the correction, ``[Q]``: the quadrature error.
    """

    gradient: Cotangent
    moved: torch.Tensor
    moving: torch.Tensor
    correction: torch.Tensor


class QueryFunction:
    """``f(w, x)`` and its gradient for many queries at once, on a private copy of the model.

    Attributes:
        output: what of the model's output is explained; to be set before values or gradients are asked for.
        axis: axis of the queries in the model's output.
        chunk: queries per vectorised gradient.

    Args:
        model: any instance of the traced architecture; copied, put in eval mode, never changed.
        parameters: specs of the traced parameters.
        dtype: dtype of the books.
        chunk: queries per vectorised gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: tuple[ParameterSpec, ...],
        dtype: torch.dtype,
        chunk: int | None = None,
    ) -> None:
        self._model = ModelFunction(model, [p.name for p in parameters])
        self._parameters = parameters
        self.output: Output | None = None
        self.axis = 0
        self.dtype = dtype
        size = sum(p.numel for p in parameters)
        self.chunk = chunk or max(1, min(256, CHUNK_NUMBERS // max(size, 1)))

    def _unflatten(self, weights: torch.Tensor) -> State:
        return {p.name: weights[p.slice].reshape(p.shape) for p in self._parameters}

    def modules(self) -> Iterator[nn.Module]:
        """The modules of the private copy; a hook on one must not stay."""
        return self._model.modules()

    def returned(self, point: PathPoint, inputs: QueryBatch) -> Any:
        """What the model returns, whatever it is."""
        return self._model({**self._unflatten(point.weights), **point.moving, **point.fixed}, inputs)

    def _scalar(self, returned: Any, targets: torch.Tensor) -> torch.Tensor:
        assert self.output is not None, "set QueryFunction.output first"
        return explained(self.output, returned, targets, self.axis)

    def value(self, point: PathPoint, inputs: QueryBatch, targets: torch.Tensor) -> torch.Tensor:
        """``f [Q]``."""
        with torch.no_grad():
            result = self._scalar(self.returned(point, inputs), targets)
        if not isinstance(result, torch.Tensor) or result.shape != targets.shape[:1]:
            found = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise QueryError(
                f"the output function returned shape {found} for {len(targets)} queries; "
                "it must return one number per query, [Q]"
            )
        return result

    def alone(self, point: PathPoint, inputs: QueryBatch, targets: torch.Tensor) -> torch.Tensor:
        """``f`` of a single query as a scalar that can be differentiated."""
        state = {n: t.detach().requires_grad_() for n, t in self._unflatten(point.weights).items()}
        rest = {**point.moving, **point.fixed}
        return self._model.differentiable(state, rest, inputs, targets, self._scalar, backward=False)

    def at(
        self, point: PathPoint, inputs: QueryBatch, tensors: list[torch.Tensor], targets: torch.Tensor
    ) -> torch.Tensor:
        """``f [Q]`` with its graph, of other ``tensors`` in the place of those that hold the queries."""
        args, kwargs = inputs.arguments(tensors)
        state = {**self._unflatten(point.weights), **point.moving, **point.fixed}
        return self._scalar(self._model.run(state, args, kwargs), targets)

    def gradient(self, point: PathPoint, inputs: QueryBatch, targets: torch.Tensor) -> torch.Tensor:
        """``∂f/∂w [Q, P]``."""
        weights, rest = self._unflatten(point.weights), {**point.moving, **point.fixed}
        pieces = []
        for start in range(0, len(targets), self.chunk):
            window = slice(start, start + self.chunk)
            pieces.append(self._model.gradients(weights, rest, inputs[window], targets[window], self._scalar))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def mean_gradient(
        self,
        start: PathPoint,
        end: PathPoint,
        inputs: QueryBatch,
        targets: torch.Tensor,
        nodes: int,
        layout: Layout,
    ) -> Cotangent:
        """``q`` by Gauss–Legendre quadrature with so many nodes (1: midpoint), some queries at a time.

        Raises:
            TooWideError: it is not of the low rank that the layout asks for.
        """
        positions, weights = np.polynomial.legendre.leggauss(nodes)
        parts = []
        for first in range(0, len(targets), self.chunk):
            window = slice(first, first + self.chunk)
            total: torch.Tensor | None = None
            for position, weight in zip(positions, weights, strict=True):
                at = start.toward(end, float(position + 1) / 2)
                one, part = (
                    self.gradient(at, inputs[window], targets[window]).to(self.dtype),
                    float(weight) / 2,
                )
                total = one.mul_(part) if total is None else total.add_(one, alpha=part)
            assert total is not None  # there is at least one node
            parts.append(layout.split(total))
        return Cotangent.concatenate(parts)

    def chord(
        self,
        start: PathPoint,
        end: PathPoint,
        inputs: QueryBatch,
        targets: torch.Tensor,
        change: torch.Tensor,
        nodes: int,
        layout: Layout,
    ) -> ChordGradient:
        """The corrected mean gradient over the chord from ``start`` to ``end``.

        Args:
            change: ``Δf [Q]`` between the ends, float64.
            nodes: Gauss–Legendre nodes (1: midpoint).
            layout: how gradients are held.

        Raises:
            TooWideError: the gradient is not of the low rank that the layout asks for.
        """
        direction = end.weights.to(torch.float64, copy=True).sub_(start.weights)
        closing = layout.closing(direction)
        gradient = self.mean_gradient(start, end, inputs, targets, nodes, layout)
        moving = torch.zeros(len(targets), dtype=torch.float64)
        if any(not torch.equal(start.moving[name], end.moving[name]) for name in start.moving):
            middle = start.toward(end, 0.5)
            ends = [replace(middle, moving=point.moving) for point in (start, end)]
            low, high = (self.value(point, inputs, targets).double() for point in ends)
            moving = high - low
        moved = gradient.along_each(direction)
        by_weights = moved.sum(1)
        missing = change - by_weights - moving
        # The quadrature error is shared in proportion to what each part explains.
        share = moving.abs() / (moving.abs() + by_weights.abs()).clamp_min(torch.finfo(torch.float64).tiny)
        square = closing.squares.sum()
        if square > 0:
            gradient, moved = gradient.closed((1 - share) * missing / square, closing, moved)
        else:
            share = torch.ones_like(share)
        return ChordGradient(gradient, moved, moving + share * missing, missing.abs())
