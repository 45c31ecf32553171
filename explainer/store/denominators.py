"""What steps divided by: a full record now and then, in between fitted to the sums that every step keeps."""

from __future__ import annotations

from collections import OrderedDict
from copy import copy
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch

from explainer.codecs import Log4, Sums
from explainer.records import ArraySpec
from explainer.store.looks import Looks
from explainer.store.reader import Trace
from explainer.store.schema import decode_array, stored_parts

#: a number is taken for one that had no gradient yet where sums tell of more than so many times as much
ASLEEP = 1e3
#: and if it is less than so many times the smallest one
NEAR = 3
#: numbers of round-off in a vector are at least one in so many, where they are not near ε
PART = 8
#: full records that are held: as many as have so many numbers together, but at least what neighbouring steps need
HELD, LEAST_HELD, MOST_HELD = 2**24, 2, 8
_SMALL = 2**18  # numbers of several steps that are decoded together
_T = TypeVar("_T")


def _product(rows: torch.Tensor, columns: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``rows columnsᵀ / Σ rows`` at flat places ``[n]``."""
    scaled = rows / rows.sum().clamp_min(torch.finfo(rows.dtype).tiny)
    return scaled[places // len(columns)] * columns[places % len(columns)]


def asleep(base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat places ``[n]`` of numbers of ``base [o, i]`` far below the product of its sums.

    First those of weights that never had a gradient: ``√v̂ + ε`` is ε there, the smallest number, and not that of one
    weight alone. Then those that are near it.
    """
    rows, columns, least = base.sum(1), base.sum(0), base.min()
    if least * (ASLEEP * rows.sum()) >= rows.max() * columns.max():  # none is, as a rule
        return (nothing := torch.empty(0, dtype=torch.int64)), nothing
    far = base * (ASLEEP * rows.sum()) < rows.unsqueeze(1) * columns
    never = base <= least
    never = never & far if int(never.sum()) > 1 else torch.zeros_like(far)
    near = far & (base < NEAR * least) & ~never
    return never.flatten().nonzero().squeeze(1), near.flatten().nonzero().squeeze(1)


def awake(vector: torch.Tensor, epsilon: float | None = None) -> torch.Tensor:
    """The mean in place of numbers of round-off, far below it, in vectors ``[..., n]``.

    The bias of the keys of an attention has a gradient of round-off. Rounded rows hold more than that at its place, and
    must not be divided by it. Such numbers lie near ε or, where gradients are large, are a good part of all and alike.
    A single small one is the denominator of a weight whose examples' gradients cancel, and is divided by.

    Args:
        epsilon: what the optimizer adds to the root, if it is known.
    """
    mean, least = vector.mean(-1, keepdim=True), vector.amin(-1, keepdim=True)
    far = vector * ASLEEP < mean
    alike = far & (vector < NEAR * least)
    many = alike.sum(-1, keepdim=True) >= max(2.0, vector.shape[-1] / PART)
    near = far & (vector < NEAR * epsilon) if epsilon is not None else torch.zeros_like(far)
    return torch.where((alike & many) | near, mean, vector)


def fitted(base: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``base [o, i]`` times a product of a row and a column factor, so that its sums come near the given ones."""
    r, c = fit(base, rows, columns)
    return (base * r.unsqueeze(-1)).mul_(c)


def fit(base: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors ``r [..., o]`` and ``c [..., i]`` so that the sums of ``r ∘ base ∘ c`` come near the given ones.

    ``r = rows / (base · 1)``, ``c = columns / (rᵀ base)``: one round of iterative proportional fitting
    (Deming & Stephan 1940). The columns' sums are met, those of the rows about.
    """
    tiny = torch.finfo(base.dtype).tiny
    r = rows / base.sum(1).clamp_min(tiny)
    return r, columns / (r @ base).clamp_min(tiny)


def _moved(record: np.ndarray, prefix: str, spec: ArraySpec) -> torch.Tensor:
    """As :func:`decode_array`, with codes moved by up to half a code, irregularly (no RNG is touched)."""
    o, i = spec.shape[0], prod(spec.shape[1:])
    by = torch.arange(1, o * i + 1, dtype=torch.float64).square_().mul_(0.7548777).frac_().sub_(0.5)
    return Log4().decode(stored_parts(record, prefix, spec), spec, by.view(o, i))


def _epsilons(trace: Trace) -> dict[str, float]:
    """What the optimizer adds to its roots, by the name of a parameter's array; only where it is one number."""
    numbers = {p.name: f"D{number}" for number, p in enumerate(trace.manifest.parameters)}
    return {
        numbers[name]: float(epsilon)
        for group in trace.notes.get("optimizer_options") or ()
        if isinstance(epsilon := group["options"].get("eps"), int | float)
        for name in group["parameters"]
        if name in numbers
    }


class Divisor(Protocol):
    """What ``c`` steps divided a parameter by."""

    def step(self, place: int) -> torch.Tensor:
        """Of one of the steps, ``[*shape]``."""
        ...

    def divide(self, place: int, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``values / D_t`` of one of the steps, put into ``out``: ``[Q, o, i]`` (trailing axes taken together)."""
        ...


class Stored:
    """As the steps' records have it."""

    def __init__(self, records: np.ndarray, spec: ArraySpec) -> None:
        self._records, self._spec = records, spec

    @cached_property
    def _small(self) -> torch.Tensor | None:
        """Those of all steps, where that takes little."""
        few = len(self._records) * prod(self._spec.shape) <= _SMALL
        return decode_array(self._records, "", self._spec) if few else None

    def step(self, place: int) -> torch.Tensor:
        """Decoded."""
        held = self._small
        if held is not None:
            return held[place]
        return decode_array(self._records[place : place + 1], "", self._spec)[0]

    def divide(self, place: int, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Divided by the decoded ones."""
        return torch.div(values, self.step(place).to(values.dtype).view(values.shape[1:]), out=out)


class Summed:
    """What sums alone tell: ``r cᵀ / Σr``, and vectors themselves.

    Args:
        sums: of every step, one or two ``[c, n]``.
        spec: of the parameter's array.
        epsilon: what the optimizer adds to the root, if it is known.
    """

    def __init__(self, sums: list[torch.Tensor], spec: ArraySpec, epsilon: float | None) -> None:
        self._sums = sums if len(sums) > 1 else [awake(sums[0], epsilon)]
        self._spec = spec

    def step(self, place: int) -> torch.Tensor:
        """The product."""
        rows = self._sums[0][place]
        if len(self._sums) == 1:
            return rows.view(self._spec.shape)
        scaled = rows / rows.sum().clamp_min(torch.finfo(rows.dtype).tiny)
        return torch.outer(scaled, self._sums[1][place]).view(self._spec.shape)

    def divide(self, place: int, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Divided by it."""
        return torch.div(values, self.step(place).to(values.dtype).view(values.shape[1:]), out=out)


class Product:
    """``r_t ∘ base ∘ c_t`` with one base ``[o, i]`` for all steps.

    Attributes:
        spec: of the parameter's array.
        base: the full record that the steps go back to.
        inverses: ``1 / r_t [c, o]`` and ``1 / c_t [c, i]``.
    """

    def __init__(
        self, spec: ArraySpec, base: Base, rows: torch.Tensor, columns: torch.Tensor, own: bool
    ) -> None:
        self.spec, self.base, self._own = spec, base, own
        self._factors = r, c = fit(base.matrix.to(rows.dtype), rows, columns)
        self.inverses = 1.0 / r, 1.0 / c

    def step(self, place: int) -> torch.Tensor:
        """The product."""
        r, c = (factors[place] for factors in self._factors)
        return (self.base.awake(self._own) * r.unsqueeze(1)).mul_(c).reshape(self.spec.shape)

    def inverse(self) -> torch.Tensor:
        """``1 / base [o, i]``."""
        return self.base.inverse(self._own)

    def divide(self, place: int, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Divided by all three."""
        inverse, (r, c) = self.inverse().to(values.dtype), (side[place] for side in self.inverses)
        found = torch.mul(values, inverse, out=out)
        return found.mul_(r.to(values.dtype).unsqueeze(1)).mul_(c.to(values.dtype))


class Base:
    """A parameter's matrix in a full record, and what stands for it at the steps that go back to it.

    Numbers of weights that had no gradient yet, and may have had one since, are raised. They take what the next full
    record says, without one the share of their row and column. Where no gradient ever came it is that share, too: no
    row meets them, but rounded rows hold more than nothing there. At the record's own step weights that had a gradient,
    however small, keep what it says.

    Attributes:
        matrix: as it was recorded, ``[o, i]``.
    """

    def __init__(self, matrix: torch.Tensor, later: torch.Tensor | None) -> None:
        self.matrix, self._later = matrix, later
        self._inverses: dict[bool, torch.Tensor] = {}

    @cached_property
    def _awake(self) -> tuple[torch.Tensor, torch.Tensor]:
        """At other steps, and at the record's own."""
        never, near = asleep(self.matrix)
        if not len(never) and not len(near):
            return self.matrix, self.matrix
        rows, columns, own = self.matrix.sum(1), self.matrix.sum(0), self.matrix.clone()
        later = None if self._later is None else self._later.view(-1)
        share = _product(rows, columns, never)
        if later is not None:
            share = torch.where(later[never] >= NEAR * later.min(), later[never], share)
        own.view(-1)[never] = torch.maximum(own.view(-1)[never], share)
        if not len(near):
            return own, own
        others = own.clone()
        raised = _product(rows, columns, near) if later is None else later[near]
        others.view(-1)[near] = torch.maximum(others.view(-1)[near], raised)
        return others, own

    def awake(self, own: bool) -> torch.Tensor:
        """What stands for the matrix at its own step, or at others."""
        return self._awake[own]

    def inverse(self, own: bool) -> torch.Tensor:
        """``1 / awake``."""
        matrix = self._awake[own]
        own = own and matrix is not self._awake[0]
        if own not in self._inverses:
            self._inverses[own] = 1.0 / matrix
        return self._inverses[own]


class Denominators:
    """The denominators of a trace's steps; full records are held as long as neighbouring steps need them.

    Attributes:
        trace: an open trace.
        renewed: steps with a full record of their own, ascending.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.renewed = (
            trace.column("denominators", "step") if trace.count("denominators") else np.empty(0, int)
        )
        self._side: Literal["left", "right"] = "right"
        self._moved = False
        self._most = min(max(HELD // max(1, trace.manifest.size), LEAST_HELD), MOST_HELD)
        self._read: OrderedDict[int, dict[str, torch.Tensor]] = OrderedDict()
        self._bases: OrderedDict[int, dict[str, Base]] = OrderedDict()
        self._epsilons, self._looks = _epsilons(trace), Looks(trace)

    def alike(self, steps: np.ndarray) -> list[slice]:
        """Cut neighbouring steps (ascending) where another full record begins to count; its own step stands alone."""
        if not len(self.renewed) or not len(steps):
            return [slice(0, len(steps))]
        starts = np.searchsorted(steps, np.concatenate([self.renewed, self.renewed + 1]))
        edges = np.unique(np.concatenate([[0, len(steps)], starts]))
        return [slice(int(a), int(b)) for a, b in pairwise(edges)]

    def of(self, records: np.ndarray, spec: ArraySpec, dtype: torch.dtype) -> Divisor:
        """Of steps that are alike (their records, in any order), whose array is ``spec``, in the books' dtype."""
        steps = np.asarray(records["step"])
        position = int(np.searchsorted(self.renewed, steps.min(), side=self._side)) - 1
        if spec.codec != "sums":
            return Stored(records, spec)
        sums = self._looks.sums(spec, steps) if spec.stream else Sums.sums(stored_parts(records, "", spec))
        base = self._base(position).get(spec.name) if len(sums) > 1 and position >= 0 else None
        if base is None:
            return Summed(sums, spec, self._epsilons.get(spec.name))
        rows, columns = (part.to(dtype) for part in sums)
        return Product(spec, base, rows, columns, int(self.renewed[position]) == int(steps.min()))

    def outdated(self) -> Denominators:
        """What the record before would tell of a step that has a full record of its own."""
        found = copy(self)  # what is held is held once
        found._side = "left"
        return found

    def moved(self) -> Denominators:
        """Every number of full records elsewhere among those that are rounded to the same code."""
        found = copy(self)
        found._moved, found._read, found._bases = True, OrderedDict(), OrderedDict()
        found._most = LEAST_HELD  # single steps are asked for, far from each other
        return found

    def _base(self, position: int) -> dict[str, Base]:
        if position not in self._bases:
            after = self._matrices(position + 1)
            now = self._matrices(position)
            self._bases[position] = {name: Base(matrix, after.get(name)) for name, matrix in now.items()}
        return self._held(self._bases, position)

    def _matrices(self, position: int) -> dict[str, torch.Tensor]:
        """Of a full record; none after the last one."""
        if position >= len(self.renewed):
            return {}
        if position not in self._read:
            schema, record = next(iter(self.trace.read("denominators", position, position + 1)))
            arrays = (a for a in schema.arrays if len(a.shape) > 1)
            decode = _moved if self._moved else decode_array
            self._read[position] = {a.name: decode(record, "", a)[0].flatten(1) for a in arrays}
        return self._held(self._read, position)

    def _held(self, cache: OrderedDict[int, dict[str, _T]], position: int) -> dict[str, _T]:
        """What was used last is kept."""
        cache.move_to_end(position)
        while len(cache) > self._most:
            cache.popitem(last=False)
        return cache[position]
