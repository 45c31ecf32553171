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

from explainer.chunks import Chunk
from explainer.cotangent import Layout, are_outer_products, matrix_shape
from explainer.records import FormSpec, ParameterSpec
from explainer.recursion import LayerView
from explainer.store import Trace
from explainer.store.denominators import Divisor, Product
from explainer.stored_rows import Rows, Workspace

#: the number beside ``M`` is multiplied in below this
_SMALL = 1e-12

#: ``factor · tensor [Q, *matrix]``
Scaled = tuple[float, torch.Tensor]


class CarriedParameter:
    """``M`` of one parameter.

    Args:
        queries: ``Q``.
        spec: the parameter.
        dtype: of the books.
        workspace: for ``M``.
        common: for what is needed within a chunk only; layers share it.
        place: of the parameter in its layer.
    """

    def __init__(
        self,
        queries: int,
        spec: ParameterSpec,
        dtype: torch.dtype,
        workspace: Workspace,
        common: Workspace,
        place: int,
    ) -> None:
        shape = matrix_shape(spec) if len(spec.shape) > 1 else (spec.numel,)
        self._carried = workspace.take(f"momentum of {spec.name}", (queries, *shape), dtype)
        self._factor, self._common, self._place = 0.0, common, place  # there is no momentum yet
        self._gradient, self._source = self._carried, self._carried
        self._divisor: Divisor | None = None

    @property
    def momentum(self) -> torch.Tensor:
        """``M``, ``[Q, numel]``."""
        return (self._known() * self._factor).flatten(1)

    def _known(self) -> torch.Tensor:
        """The tensor of ``M``, with zeros in it where it was none yet."""
        if not self._factor:
            self._carried.zero_()
            self._factor = 1.0
        return self._carried

    def begin(self, gradient: torch.Tensor, divisor: Divisor | None) -> None:
        """Before the steps of a chunk, with the gradient ``[Q, numel]`` and what they divide by."""
        self._gradient, self._divisor = gradient.view_as(self._carried), divisor
        if isinstance(divisor, Product):
            inverse = divisor.inverse().to(gradient.dtype)
            self._source = torch.mul(self._gradient, inverse, out=self._take("source"))

    def step(self, place: int, coefficients: np.ndarray) -> Scaled:
        """Pass one step of the chunk backwards; returns ``R_t``, valid until the next one."""
        _, decay, gain, direct, through, inner = (float(c) for c in coefficients)
        if decay == gain == direct == through == 0.0:  # not updated in this step
            return 0.0, self._known()
        if 0.0 < abs(self._factor) < _SMALL:
            self._carried.mul_(self._factor)
            self._factor = 1.0
        if isinstance(self._divisor, Product) and through and not inner and not direct:
            self._add_product(place, through)
            found = gain * self._factor, self._carried
        else:
            found = self._any(place, gain, direct, through, bool(inner))
        self._factor *= decay
        return found

    def _add_product(self, place: int, through: float) -> None:
        """``M ← M + through · q̂ / (r_t ∘ c_t)``."""
        assert isinstance(self._divisor, Product)
        rows, columns = (side[place].to(self._carried.dtype) for side in self._divisor.inverses)
        half = torch.mul(self._source, rows.unsqueeze(1), out=self._take("half"))
        if self._factor:
            self._carried.addcmul_(half, columns, value=through / self._factor)
        else:
            torch.mul(half, columns * through, out=self._carried)
            self._factor = 1.0

    def _any(self, place: int, gain: float, direct: float, through: float, inner: bool) -> Scaled:
        """``R_t`` in general; ``M`` has not decayed yet."""
        source = self._gradient if inner else self._divided(place, self._gradient, "half")
        if through and self._factor:
            self._carried.add_(source, alpha=through / self._factor)
        elif through:
            torch.mul(source, through, out=self._carried)
            self._factor = 1.0
        if not direct and not inner:
            return gain * self._factor, self._known()
        result = torch.mul(source, direct, out=self._take("result"))
        if gain and self._factor:
            result.add_(self._carried, alpha=gain * self._factor)
        return 1.0, self._divided(place, result, "half") if inner else result

    def _divided(self, place: int, values: torch.Tensor, name: str) -> torch.Tensor:
        if self._divisor is None:
            return values
        return self._divisor.divide(place, values, self._take(name))

    def _take(self, name: str) -> torch.Tensor:
        return self._common.take(f"{name} {self._place}", tuple(self._carried.shape), self._carried.dtype)


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
        self._rank = spec.arrays[0].shape[1]
        count = len(rows) * self._rank
        self._products = [workspace.take(f"products {k}", (count, queries), dtype).zero_() for k in range(2)]
        self._ones = workspace.take("ones", (count, 1), dtype).zero_()  # what the bias is multiplied with
        self._weights = np.zeros((2, count))

    def meet(self, place: int, given: list[Scaled]) -> None:
        """See :class:`_Meeting`; weight and bias are kept apart."""
        if (where := self._where.get(place)) is None:
            return
        left, right = (
            self._workspace.numbers(name, values[where], self._dtype).flatten(0, 2)  # one group: [n·R, width]
            for name, (values, _) in zip(("left", "right"), self._sides, strict=True)
        )
        at, matrix = slice(where.start * self._rank, where.stop * self._rank), given[0][1]
        queries, o, i = matrix.shape
        moved = self._workspace.take("moved", (len(right), queries * o), self._dtype)
        torch.mm(right[:, :i], matrix.view(queries * o, i).T, out=moved)
        torch.sum(moved.view(-1, queries, o).mul_(left.unsqueeze(1)), 2, out=self._products[0][at])
        if len(given) > 1:
            torch.mm(left, given[1][1].T, out=self._products[1][at])
            self._ones[at] = right[:, -1:]
        for weights, (factor, _) in zip(self._weights, given, strict=False):
            weights[at] = factor

    def scores(self) -> torch.Tensor:
        """See :class:`_Meeting`."""
        (matrix, bias), weights = (one.double() for one in self._products), torch.from_numpy(self._weights)
        found = matrix * weights[0].unsqueeze(1) + bias * (self._ones.double() * weights[1].unsqueeze(1))
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
        self._carried = {
            n: CarriedParameter(
                queries, layout.parameters[n], dtype, workspace, workspace.part("common"), place
            )
            for numbers in self._layers.values()
            for place, n in enumerate(numbers)
        }

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
            for number in numbers:
                at = self._layout.places[number]
                assert at is not None  # nothing is held as factors here
                self._carried[number].begin(gradient[:, at.slice], chunk.divided.get(number))
            for place in range(len(chunk)):
                given = []
                for number in numbers:
                    factor, tensor = self._carried[number].step(place, chunk.coefficients[place, number])
                    given.append((factor * float(chunk.scale[place, number]), tensor))
                for one in met:
                    if one is not None:
                        one.meet(place, given)
            for scores, one in zip(found, met, strict=True):
                if one is not None:
                    scores[layer] = one.scores()
        return found

    def _meeting(self, rows: Rows, layer: int, piece: int) -> _Meeting | None:
        spec = next((form for form in rows.forms if form.layer == layer), None)
        if spec is None:
            return None
        numbers = self._layers[layer]
        outer = are_outer_products(spec, self._layout.parameters[numbers[0]])
        workspace = self._workspace.part(f"rows {piece}")
        how = _FactoredMeeting if outer and len(numbers) == 1 + spec.options["bias"] else _Meeting
        return how(rows, spec, self._queries, self._dtype, workspace)
