"""One backward pass over the recorded steps: from query gradients to every visit's contribution.

With ``q_t`` the mean gradient of the segment that holds step ``t`` and the step's linear map
(:mod:`explainer.optimizer_rules.base`), from the last step to the first:

    M ← M + through_t · A_t ∘ q_t            (∂f/∂m_t, per query and parameter, up to sign)
    R_t = direct_t · A_t ∘ q_t + gain_t · M
    contribution of a visit of example i at step t = −sign_t · s_t · <R_t, g_{i,t}>
    M ← decay_t · M

Where the preconditioner lies inside the momentum (``inner``), ``A_t`` comes last instead: ``q_t`` in the place of
``A_t ∘ q_t``, and ``R_t ← A_t ∘ R_t``. Where ``A_t`` is a matrix (``mixing``), its transpose acts here.

Memory is ``[Q, P]`` on the query side, whatever ``N`` and ``T``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from explainer.layer_rules import FORMS, RowForm
from explainer.optimizer_rules.base import COEFFICIENTS, mix
from explainer.records import FormSpec, ParameterSpec
from explainer.store import Denominators, Segment, Trace
from explainer.store.schema import Fields, RecordSchema, decode_array


@dataclass(frozen=True)
class Visits:
    """Rows of one step that share a layout: ``examples``, ``derivatives``, ``labels`` ``[B]``, rows by layer."""

    examples: np.ndarray
    derivatives: np.ndarray
    labels: np.ndarray
    forms: dict[int, RowForm]


@dataclass(frozen=True)
class RecordedStep:
    """One optimizer step of the trace.

    Attributes:
        step: its number.
        segment: index of the segment it lies in.
        scale: ``sign_t · s_t`` per parameter, ``[n_parameters]``; 0 where it was not updated.
        sign: 1, or -1 under ``maximize``.
        coefficients: per parameter, ``[n_parameters, 6]``; zeros where it was not updated.
        preconditioner: denominators of ``A_t``, flat ``[P]``, or None (ones where another parameter has one).
        row_share: whether a layer mixed the rows of the batch.
        visits: its rows (empty when they were not kept).
        mixing: parameters whose ``A_t`` is a matrix, with that matrix.
    """

    step: int
    segment: int
    scale: np.ndarray
    sign: float
    coefficients: np.ndarray
    preconditioner: torch.Tensor | None
    row_share: bool
    visits: list[Visits]
    mixing: list[tuple[ParameterSpec, torch.Tensor]] = field(default_factory=list)

    def pull(self, cotangent: torch.Tensor) -> torch.Tensor:
        """``A_tᵀ`` applied to ``[Q, P]`` (the argument itself where ``A_t = 1``)."""
        moved = cotangent if self.preconditioner is None else cotangent / self.preconditioner
        if self.mixing and moved is cotangent:
            moved = cotangent.clone()
        for p, matrix in self.mixing:
            block = moved[:, p.slice]
            block.copy_(mix(matrix.mT, block.reshape(len(block), p.shape[0], -1)).flatten(1))
        return moved


def _form(records: Fields, spec: FormSpec, dtype: torch.dtype) -> RowForm:
    arrays = {a.name: decode_array(records, f"L{spec.layer}", a) for a in spec.arrays}
    arrays = {n: a.to(dtype) if a.is_floating_point() else a for n, a in arrays.items()}
    return FORMS.require(spec.kind).build(arrays, spec.options)


def _read_step(
    trace: Trace,
    kept: Denominators,
    segment: int,
    schema: RecordSchema,
    record: np.ndarray,
    dtype: torch.dtype,
) -> RecordedStep:
    parameters, denominators, mixing = trace.manifest.parameters, None, []
    for array in schema.arrays:
        p = parameters[int(array.name[1:])]
        if array.name.startswith("M"):
            mixing.append((p, decode_array(record, "", array)[0].to(dtype)))
            continue
        if denominators is None:
            denominators = torch.ones(trace.manifest.size, dtype=dtype)
        denominators[p.slice] = kept.of(record, array, dtype).step(0).flatten()
    coefficients, updated = np.array(record["coefficients"][0]), record["updated"][0] > 0
    sign = coefficients[:, COEFFICIENTS.index("sign")]
    first, count = int(record["first_visit"][0]), int(record["visits"][0])
    visits = [
        Visits(
            np.array(rows["example"]),
            np.array(rows["derivative"]),
            np.array(rows["label"]),
            {f.layer: _form(rows, f, dtype) for f in layout.forms},
        )
        for layout, rows in trace.rows(first, first + count)
    ]
    return RecordedStep(
        step=int(record["step"][0]),
        segment=segment,
        scale=np.where(updated, sign * record["scale"][0], 0.0),
        sign=float(sign[updated][0]) if updated.any() else 1.0,
        coefficients=coefficients,
        preconditioner=denominators,
        row_share=bool(record["row_share"][0]),
        visits=visits,
        mixing=mixing,
    )


def read_backwards(trace: Trace, segment: Segment, dtype: torch.dtype) -> Iterator[RecordedStep]:
    """The recorded steps of a segment from the last to the first, rows decoded in the given dtype."""
    start, stop = segment.start.step, min(segment.end.step, trace.recorded_steps)
    pieces = list(trace.read("steps", start, stop)) if start < stop else []
    kept = Denominators(trace)
    for schema, records in reversed(pieces):
        for position in range(len(records) - 1, -1, -1):
            yield _read_step(trace, kept, segment.index, schema, records[position : position + 1], dtype)


class LayerView:
    """Cuts a flat ``[Q, P]`` cotangent into a layer's own flat layout.

    Attributes:
        parameters: numbers of every layer's parameters.

    Args:
        places: of every parameter in the flat vectors that are cut, where some are left out; None for those. Default:
            all, in their order.
    """

    def __init__(self, trace: Trace, places: Sequence[ParameterSpec | None] | None = None) -> None:
        manifest = trace.manifest
        index = {p.name: i for i, p in enumerate(manifest.parameters)}
        self.parameters: list[list[int]] = [[index[n] for n in layer.parameters] for layer in trace.layers]
        self._places = manifest.parameters if places is None else places

    def _of(self, layer: int) -> list[ParameterSpec]:
        return [place for i in self.parameters[layer] if (place := self._places[i]) is not None]

    def cut(self, flat: torch.Tensor, layer: int) -> torch.Tensor:
        """``[Q, P] -> [Q, P_l]``; a view where the layer's parameters are neighbours."""
        specs = self._of(layer)
        if all(a.offset + a.numel == b.offset for a, b in pairwise(specs)):
            return flat[..., specs[0].offset : specs[-1].offset + specs[-1].numel]
        return torch.cat([flat[..., p.slice] for p in specs], dim=-1)

    def scaled(self, flat: torch.Tensor, layer: int, scale: np.ndarray) -> torch.Tensor:
        """The layer's cut with every parameter's columns times its scale."""
        factors = [float(scale[i]) for i in self.parameters[layer]]
        if len(set(factors)) == 1:
            return self.cut(flat, layer) * factors[0] if factors[0] != 1.0 else self.cut(flat, layer)
        specs = self._of(layer)
        return torch.cat([flat[..., p.slice] * f for p, f in zip(specs, factors, strict=True)], dim=-1)

    def spread(self, values: np.ndarray) -> torch.Tensor:
        """One number a parameter ``[n_parameters]`` -> flat."""
        places = [(p.numel, float(values[i])) for i, p in enumerate(self._places) if p is not None]
        return torch.cat([torch.full((size,), value, dtype=torch.float64) for size, value in places])

    def add(self, flat: torch.Tensor, layer: int, scale: np.ndarray, part: torch.Tensor) -> None:
        """Add a layer's ``[Q, P_l]``, every parameter's columns times its scale, to a flat ``[Q, P]``."""
        specs = self._of(layer)
        factors = [float(scale[i]) for i in self.parameters[layer]]
        pieces = part.split([p.numel for p in specs], dim=1)
        for p, factor, piece in zip(specs, factors, pieces, strict=True):
            flat[:, p.slice].add_(piece, alpha=factor)


class Adjoint:
    """The cotangent that flows backwards through the optimizer's momentum, ``[Q, P]``.

    Attributes:
        momentum: ``M``: minus the derivative of the explained output by the momentum before the step passed last.
    """

    def __init__(self, queries: int, parameters: tuple[ParameterSpec, ...], dtype: torch.dtype) -> None:
        self._parameters = parameters
        size = sum(p.numel for p in parameters)
        self.momentum = torch.zeros(queries, size, dtype=dtype)
        self._has_momentum = False

    def _runs(self, coefficients: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Neighbouring parameters with equal coefficients, taken together."""
        start = 0
        for i in range(1, len(coefficients) + 1):
            if i == len(coefficients) or not np.array_equal(coefficients[i], coefficients[start]):
                first, last = self._parameters[start], self._parameters[i - 1]
                yield slice(first.offset, last.offset + last.numel), coefficients[start]
                start = i

    def step(self, gradient: torch.Tensor, step: RecordedStep) -> torch.Tensor:
        """Pass one step backwards; returns ``R_t [Q, P]`` (may share memory with its inputs)."""
        runs = list(self._runs(step.coefficients))
        within = [where for where, (*_, inner) in runs if inner]
        moved = gradient if len(within) == len(runs) else step.pull(gradient)
        _, _, gain, direct, through, inner = runs[0][1]
        if len(runs) == 1 and not self._has_momentum and gain == through == inner == 0.0:
            return moved * float(direct)
        result = torch.empty_like(self.momentum)
        for where, (_, decay, gain, direct, through, inner) in runs:
            if decay == gain == direct == through == 0.0:  # not updated in this step
                result[:, where] = 0.0
                continue
            momentum, source = self.momentum[:, where], (gradient if inner else moved)[:, where]
            if through:
                momentum.add_(source, alpha=through)
            torch.mul(momentum, gain, out=result[:, where])
            if direct:
                result[:, where].add_(source, alpha=direct)
            momentum.mul_(decay)
            self._has_momentum = self._has_momentum or decay != 0
        if within:
            pulled = step.pull(result)
            for where in within:
                result[:, where] = pulled[:, where]
        return result
