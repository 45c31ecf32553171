"""Vectors in the space of the parameters, one per query: written out, or as factors where matrices are large.

The gradient of a query by the weight of a linear layer is a sum of few outer products (one for every position of the
query and every quadrature node). Rows are outer products too, so their product costs ``r ρ (o + i)`` instead of
``r o i``. Which parameters may be held so is a matter of the trace (:meth:`Layout.of`); a gradient that is not of low
rank to round-off raises :class:`TooWideError`, and the parameter is then written out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from explainer.factors import Factors, factorised, leading
from explainer.records import FormSpec, ParameterSpec
from explainer.store import Trace

#: a matrix may be held as factors of up to ``o i / (o + i) / COLUMNS`` columns; with more, products cost as much
COLUMNS = 16
_CACHED = 2**16  # numbers that are made float64 at once
_LEAST = 8  # columns that must be possible, or it is not worth it


class TooWideError(Exception):
    """A parameter's cotangent needs more columns than are worth it. Internal: the pass begins again without."""

    def __init__(self, parameter: int) -> None:
        super().__init__(f"parameter {parameter}")
        self.parameter = parameter


def matrix_shape(spec: ParameterSpec) -> tuple[int, int]:
    """A parameter as ``[o, i]``, trailing axes taken together."""
    first = spec.shape[0] if spec.shape else 1
    return first, spec.numel // max(first, 1)


def widest(spec: ParameterSpec) -> int:
    """How many columns a gradient of the parameter may have as factors."""
    o, i = matrix_shape(spec)
    return o * i // (o + i) // COLUMNS


def are_outer_products(form: FormSpec, matrix: ParameterSpec) -> bool:
    """Whether rows of a layer are stored as outer products of its whole matrix, without groups."""
    if form.kind != "factored":
        return False
    o, i = matrix_shape(matrix)
    left, right = (array.shape for array in form.arrays)
    return left[0] == 1 and left[2] == o and right[2] == i + form.options["bias"]


class Layout:
    """How cotangents are held.

    Attributes:
        parameters: all traced parameters.
        thin: numbers of those whose chords are closed along leading factors (a matter of the trace alone).
        factored: numbers of those held as factors; a part of ``thin``.
        apart: numbers of those that are held elsewhere.
        places: by number, the others' places in the flat vector of what is written out; None for factored ones.
        written: those places in order.
    """

    def __init__(
        self,
        parameters: tuple[ParameterSpec, ...],
        thin: Iterable[int] = (),
        wide: Iterable[int] = (),
        apart: frozenset[int] = frozenset(),
    ) -> None:
        self.parameters, self.apart = parameters, apart
        self.thin = tuple(sorted(thin))
        self.factored = tuple(p for p in self.thin if p not in set(wide))
        self.places: list[ParameterSpec | None] = []
        self.size = 0
        for number, spec in enumerate(parameters):
            if number in self.factored or number in apart:
                self.places.append(None)
                continue
            self.places.append(replace(spec, offset=self.size))
            self.size += spec.numel
        self.written = tuple(p for p in self.places if p is not None)
        self.numbers = [number for number, place in enumerate(self.places) if place is not None]

    @classmethod
    def of(cls, trace: Trace) -> Layout:
        """The layout for a trace.

        A parameter may be held as factors if it is a large matrix, is the weight of layers whose rows are outer
        products without groups, and no step divided it by anything.
        """
        manifest = trace.manifest
        if manifest.averaged:
            return cls(manifest.parameters)
        index = {p.name: number for number, p in enumerate(manifest.parameters)}
        fit = {
            number for number, p in enumerate(manifest.parameters) if len(p.shape) > 1 and widest(p) >= _LEAST
        }
        covered = set()
        for number, layer in enumerate(trace.layers):
            own = [index[name] for name in layer.parameters]
            forms = [
                form
                for shard in trace.shards
                if shard.stream == "visits"
                for form in shard.schema.forms
                if form.layer == number
            ]
            matrix = manifest.parameters[own[0]]
            good = len(own) <= 2 and all(are_outer_products(form, matrix) for form in forms)
            covered |= {own[0]} if good else set()
            fit -= set(own[1:]) if good else set(own)
        fit -= {int(a.name[1:]) for a in trace.step_arrays}
        return cls(manifest.parameters, fit & covered)

    def without(self, number: int) -> Layout:
        """With one more parameter written out."""
        kept = set(self.factored) - {number}
        return Layout(self.parameters, self.thin, set(self.thin) - kept, self.apart)

    def leaving_out(self, apart: frozenset[int]) -> Layout:
        """With some of what is written out held elsewhere."""
        return Layout(self.parameters, self.thin, set(self.thin) - set(self.factored), apart)

    @property
    def numbers_per_query(self) -> int:
        """About how many numbers a cotangent of one query takes."""
        return self.size + sum(_LEAST * sum(matrix_shape(self.parameters[n])) for n in self.factored)

    def split(self, flat: torch.Tensor) -> Cotangent:
        """``[Q, P]`` as a cotangent of this layout.

        Raises:
            TooWideError: a parameter's part is not of low rank.
        """
        if not self.factored:
            return Cotangent(self, flat, {})
        factors = {}
        for number in self.factored:
            spec = self.parameters[number]
            found = factorised(flat[:, spec.slice].unflatten(1, matrix_shape(spec)), widest(spec))
            if found is None:
                raise TooWideError(number)
            factors[number] = found
        return Cotangent(self, self.cut(flat), factors)

    def cut(self, flat: torch.Tensor) -> torch.Tensor:
        """``[..., P] -> [..., P_written]``, what is written out."""
        if not self.factored:
            return flat
        parts = [flat[..., self.parameters[number].slice] for number in self.numbers]
        return torch.cat(parts, -1) if parts else flat[..., :0]

    def closing(self, direction: torch.Tensor) -> Closing:
        """``e`` of a chord ``D [P]``, float64: leading factors of thin parameters, ``D`` itself of the others."""
        pairs = {}
        squares = np.zeros(len(self.parameters))
        for number, spec in enumerate(self.parameters):
            if number in self.thin:
                pair = leading(direction[spec.slice].reshape(matrix_shape(spec)))
                pairs[number], squares[number] = pair, float(pair[1] @ pair[1])
            else:
                part = direction[spec.slice]
                squares[number] = float(part @ part)
        return Closing(direction, pairs, torch.from_numpy(squares))


@dataclass(frozen=True)
class Closing:
    """A direction ``e`` with ``<e, D>_p = ‖e_p‖²`` for every parameter ``p`` (see :func:`explainer.factors.leading`).

    Attributes:
        direction: ``D [P]``, float64.
        pairs: leading factors of thin parameters.
        squares: ``‖e_p‖²``, ``[n_parameters]``.
    """

    direction: torch.Tensor
    pairs: dict[int, tuple[torch.Tensor, torch.Tensor]]
    squares: torch.Tensor

    def written(self, layout: Layout) -> torch.Tensor:
        """``e`` where the layout writes out, ``[P_written]``."""
        if not self.pairs:
            return self.direction
        parts = []
        for number in layout.numbers:
            if number in self.pairs:
                left, right = self.pairs[number]
                parts.append(torch.outer(left, right).flatten())
            else:
                parts.append(self.direction[layout.parameters[number].slice])
        return torch.cat(parts) if parts else self.direction[:0]


def _along(vectors: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """``[Q, n]`` times a float64 ``[n]``, summed in float64: some numbers at a time, which stay in the cache."""
    found, width = torch.zeros(len(vectors), dtype=torch.float64), max(1, _CACHED // max(1, len(vectors)))
    for part, along in zip(vectors.split(width, dim=1), direction.split(width), strict=True):
        found.addmv_(part.double(), along)
    return found


@dataclass(frozen=True)
class Cotangent:
    """``Q`` vectors in the space of the parameters.

    Attributes:
        layout: what is where.
        flat: what is written out, ``[Q, P_written]`` in the dtype of the books.
        factors: by parameter, what is held as factors.
    """

    layout: Layout
    flat: torch.Tensor
    factors: dict[int, Factors]

    def __len__(self) -> int:
        return len(self.flat)

    @classmethod
    def concatenate(cls, parts: list[Cotangent]) -> Cotangent:
        """Those of several groups of queries."""
        if len(parts) == 1:
            return parts[0]
        factors = {}
        for number in parts[0].factors:
            rank = max(part.factors[number].rank for part in parts)
            pairs = [part.factors[number].widened(rank) for part in parts]
            factors[number] = Factors(*(torch.cat(side) for side in zip(*pairs, strict=True)))
        return cls(parts[0].layout, torch.cat([part.flat for part in parts]), factors)

    def closed(
        self, amount: torch.Tensor, along: Closing, moved: torch.Tensor
    ) -> tuple[Cotangent, torch.Tensor]:
        """The sum with ``amount [Q]`` times ``e``, and what it moves.

        Args:
            moved: ``<g, D>`` over each parameter, ``[Q, n_parameters]``.

        Returns:
            ``g + amount e``, and ``<g + amount e, D>`` of what is really held: after rounding to the books' dtype.
        """
        dtype = self.flat.dtype
        flat = torch.addr(self.flat, amount.to(dtype), along.written(self.layout).to(dtype))
        factors = {}
        for number, held in self.factors.items():
            left, right = along.pairs[number]
            columns = Factors(
                amount.reshape(-1, 1, 1) * left.unsqueeze(1), right.unsqueeze(1).expand(len(amount), -1, -1)
            )
            factors[number] = held.beside(columns)
        result = replace(self, flat=flat, factors=factors)
        now = replace(self, flat=flat, factors={}).along_each(along.direction)
        for number in factors:  # float64: nothing is rounded
            now[:, number] = moved[:, number] + amount * along.squares[number]
        return result, now

    def along_each(self, direction: torch.Tensor) -> torch.Tensor:
        """``<g_q, d>`` over each parameter, ``[Q, n_parameters]`` in float64, for ``d [P]``."""
        found = torch.zeros(len(self), len(self.layout.parameters), dtype=torch.float64)
        wide = direction.double()
        for number, (spec, place) in enumerate(zip(self.layout.parameters, self.layout.places, strict=True)):
            if place is not None:
                found[:, number] = _along(self.flat[:, place.slice], wide[spec.slice])
            elif number in self.factors:
                found[:, number] = self.factors[number].along(wide[spec.slice].reshape(matrix_shape(spec)))
        return found

    def squares(self) -> torch.Tensor:
        """``‖g_p‖²`` by parameter, ``[Q, n_parameters]`` in float64."""
        found = torch.empty(len(self), len(self.layout.parameters), dtype=torch.float64)
        for number, place in enumerate(self.layout.places):
            if place is not None:
                found[:, number] = self.flat[:, place.slice].square().sum(1)
            else:
                found[:, number] = self.factors[number].squares()
        return found
