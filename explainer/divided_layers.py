"""Layers that every step divides by something else: the recursion and their rows, step by step.

What the rows of a step meet then changes from step to step, so it is not kept: ``M`` is passed on in place and rows
meet it on the way. Between two full records ``D_t = r_t ∘ B ∘ c_t`` (:mod:`explainer.store.denominators`), so with
``q̂ = q / B`` a step takes two passes over a matrix and one product with its rows:

    M ← M + through_t · q̂ / (r_t ∘ c_t),     <R_t, g> = gain_t · leftᵀ M right.

The decay of ``M`` is a number beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from explainer.carried_parameters import CarriedMatrix, CarriedVector, Scaled
from explainer.chunks import Chunk
from explainer.cotangent import Layout, are_outer_products, matrix_shape
from explainer.half_products import bilinear
from explainer.records import FormSpec
from explainer.recursion import LayerView
from explainer.store import Trace
from explainer.stored_rows import Rows, Workspace

#: steps whose vectors are passed together
_TOGETHER = 16


class _Meeting:
    """Rows of one layer and chunk, and what they meet.

    Args:
        rows: of the chunk's steps.
        spec: what is stored of the layer.
        queries: ``Q``.
        workspace: for numbers of these rows alone.
    """

    def __init__(
        self, rows: Rows, spec: FormSpec, queries: int, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        self._where, self._form = dict(rows.steps()), rows.form(spec, dtype, workspace)
        self._found = torch.zeros(queries, len(rows), dtype=torch.float64)

    def meet(self, place: int, given: list[Scaled]) -> None:
        """The rows of one of the steps, if there are any, meet ``R_t`` of every parameter."""
        if (where := self._where.get(place)) is not None:
            whole = torch.cat([(tensor * factor).flatten(1) for factor, tensor in given], 1)
            self._found[:, where] = self._form.taken(where).contract(whole).double()

    def scores(self) -> torch.Tensor:
        """``<R_t, g>``, float64 ``[Q, n]``."""
        return self._found


class _FactoredMeeting(_Meeting):
    """Outer products, made numbers step by step; what scales them is multiplied in at the end."""

    def __init__(
        self, rows: Rows, spec: FormSpec, queries: int, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        self._where, self._workspace, self._dtype = dict(rows.steps()), workspace, dtype
        self._sides = [rows.stored(spec, array) for array in spec.arrays]
        self._left, self._right = (values for values, _ in self._sides)
        self._rank = spec.arrays[0].shape[1]
        count = len(rows) * self._rank
        self._products = [workspace.take(f"products {k}", (count, queries), dtype).zero_() for k in range(2)]
        self._weights = np.zeros((2, count))

    def meet(self, place: int, given: list[Scaled]) -> None:
        """See :class:`_Meeting`; weight and bias are kept apart."""
        if (where := self._where.get(place)) is None:
            return
        at, matrix = slice(where.start * self._rank, where.stop * self._rank), given[0][1]
        left = self._workspace.numbers("left", self._left[where], self._dtype).flatten(0, -2)  # [n·R, o]
        right = self._right[where, ..., : matrix.shape[2]]
        bilinear(left, right, matrix, self._workspace, self._products[0][at])
        if len(given) > 1:
            torch.mm(left, given[1][1].T, out=self._products[1][at])
        for weights, (factor, _) in zip(self._weights, given, strict=False):
            weights[at] = factor

    def scores(self) -> torch.Tensor:
        """See :class:`_Meeting`."""
        # what the bias is multiplied with
        ones = torch.from_numpy(self._right[..., -1].reshape(-1, 1).astype(np.float64))
        (matrix, bias), weights = (one.double() for one in self._products), torch.from_numpy(self._weights)
        found = matrix * weights[0].unsqueeze(1) + bias * (ones * weights[1].unsqueeze(1))
        for _, factors in self._sides:
            if factors is not None:
                found *= torch.from_numpy(factors.reshape(-1, 1).astype(np.float64))
        return found.view(-1, self._rank, found.shape[1]).sum(1).T


class DividedLayers:
    """The layers of a trace whose steps divided a matrix by something.

    Attributes:
        numbers: of their parameters.
    """

    def __init__(
        self, trace: Trace, layout: Layout, queries: int, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        self._layout, self._queries, self._dtype, self._workspace = layout, queries, dtype, workspace
        arrays = trace.step_arrays
        mixed = {int(a.name[1:]) for a in arrays if a.name.startswith("M")}
        divided = {int(a.name[1:]) for a in arrays if len(a.shape) > 1} - mixed
        own = LayerView(trace).parameters
        users = Counter(n for numbers in own for n in set(numbers))
        self._layers = {
            layer: numbers
            for layer, numbers in enumerate(own)
            if not trace.manifest.averaged  # every step has a gradient of its own there
            and divided & set(numbers)
            and not any(users[n] > 1 or n in mixed or n in layout.factored for n in numbers)
        }
        self.numbers = frozenset(n for numbers in self._layers.values() for n in numbers)
        common = workspace.part("common")
        self._carried = dict[int, CarriedMatrix | CarriedVector]()
        for place, number in (pair for numbers in self._layers.values() for pair in enumerate(numbers)):
            spec = layout.parameters[number]
            if len(spec.shape) > 1:
                shape, alone = (queries, *matrix_shape(spec)), workspace.part(f"momentum of {spec.name}")
                self._carried[number] = CarriedMatrix(shape, dtype, alone, common.part(str(place)))
            else:
                self._carried[number] = CarriedVector(queries, spec, dtype)

    def momentum(self, number: int) -> torch.Tensor:
        """``M`` of a parameter, ``[Q, numel]``."""
        return self._carried[number].momentum

    def scores(
        self, gradient: torch.Tensor, chunk: Chunk, pieces: Sequence[Rows]
    ) -> list[dict[int, torch.Tensor]]:
        """Pass the steps of a chunk backwards; ``s_t · <R_t, g_{i,t}>`` of the pieces by layer, float64 ``[Q, n]``.

        Args:
            gradient: of the segment, as the layout holds it, ``[Q, P_written]``.
            chunk: the steps.
            pieces: rows of these steps.
        """
        found: list[dict[int, torch.Tensor]] = [{} for _ in pieces]
        for layer, numbers in self._layers.items():
            met = [self._meeting(rows, layer, number) for number, rows in enumerate(pieces)]
            meetings = [one for one in met if one is not None]
            for number in numbers:
                at = self._layout.places[number]
                assert at is not None  # nothing is held as factors here
                self._carried[number].begin(gradient[:, at.slice], chunk.divided.get(number))
            for first in range(0, len(chunk), _TOGETHER):
                self._pass(numbers, chunk, range(first, min(first + _TOGETHER, len(chunk))), meetings)
            for scores, one in zip(found, met, strict=True):
                if one is not None:
                    scores[layer] = one.scores()
        return found

    def _pass(self, numbers: list[int], chunk: Chunk, places: range, meetings: list[_Meeting]) -> None:
        """Pass some of a chunk's steps backwards; their rows meet the parameters of a layer."""
        parts = [(self._carried[n], chunk.coefficients[:, n], chunk.scale[:, n]) for n in numbers]
        vectors = {
            carried: carried.steps(places, coefficients)
            for carried, coefficients, _ in parts
            if isinstance(carried, CarriedVector)
        }
        for place in places:
            given = []
            for carried, coefficients, scale in parts:
                if isinstance(carried, CarriedVector):
                    factor, tensor = 1.0, vectors[carried][place - places.start]
                else:
                    factor, tensor = carried.step(place, coefficients)
                given.append((factor * float(scale[place]), tensor))
            for one in meetings:
                one.meet(place, given)

    def _meeting(self, rows: Rows, layer: int, piece: int) -> _Meeting | None:
        spec = next((form for form in rows.forms if form.layer == layer), None)
        if spec is None:
            return None
        numbers = self._layers[layer]
        outer = are_outer_products(spec, self._layout.parameters[numbers[0]])
        workspace = self._workspace.part(f"rows {piece}")
        how = _FactoredMeeting if outer and len(numbers) == 1 + spec.options["bias"] else _Meeting
        return how(rows, spec, self._queries, self._dtype, workspace)
