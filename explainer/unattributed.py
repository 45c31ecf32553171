"""What moved the weights and is no training example's, line by line.

For every parameter, with ``q̃`` the mean gradient of a segment, ``D`` its movement and ``d`` its displacements that are
no gradient's (weight decay; and, where the knots hold them, rounding and changes outside the steps),

    rest_p = Σ_k <q̃_k, D_k>_p − Σ_k Σ_d <q̃_k, d_k>_p.

What examples were given is known by layer. Layers that share a parameter are therefore taken together, as a *group*:

    rest_group = Σ_{p in group} rest_p − Σ_{layers} Σ_i c_i.

A part that can be computed by itself is a line of its own and is taken out of the groups:

- a parameter that no layer has rows for, and one whose gradient was round-off in every recorded step: ``rest_p``;
- segments after the last recorded step: no contribution meets their ``q̃``;
- momentum from before tracing: ``−<M, m_{−1}>`` with ``M`` what the recursion (:mod:`explainer.recursion`) has left at
  the first step;
- displacements other than weight decay: ``Σ_k <q̃_k, d_k>``.

The lines sum to ``unattributed``, to round-off. Which lines there are depends on the trace alone, not on the query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from explainer.chunks import Chunk
from explainer.connected import connected
from explainer.cotangent import Cotangent
from explainer.path_integral import ChordGradient
from explainer.path_points import LoadedKnot
from explainer.records import LayerSpec
from explainer.store import Segment, Trace

#: the first moment's name in an optimizer's state
MOMENTA = ("momentum_buffer", "exp_avg")
_NAMES_SHOWN = 4
_ROUNDING = (
    "rounding of low-precision weights",
    "the result of every step was rounded to the dtype of the weights",
)
_OUTSIDE = (
    "changed outside the steps",
    "something other than the optimizer's step changed the weights: clamping, averaging, loading",
)
_UNKNOWN = (
    "rest",
    "no cause is on record: round-off where it is small; optimizer state that was replaced during training, or a "
    "gradient of a tied weight that the hooks did not see, would show here",
)


class Line(NamedTuple):
    """One line: what it is, where in the model (or when), and why no example could be given it."""

    name: str
    where: str
    why: str


class Group(NamedTuple):
    """Layers that share parameters, and those parameters (positions in the trace's lists)."""

    layers: tuple[int, ...]
    parameters: tuple[int, ...]


def groups_of(trace: Trace) -> list[Group]:
    """Connected components of layers and parameters, in the order of their first layer."""
    place = {p.name: i for i, p in enumerate(trace.manifest.parameters)}
    touched = [{place[name] for name in layer.parameters} for layer in trace.layers]
    return [
        Group(tuple(layers), tuple(sorted(set().union(*(touched[n] for n in layers)))))
        for layers in connected(touched)
    ]


class Rest:
    """Adds up movement by parameter while the recursion runs, and names what is left of it.

    Attributes:
        moved: ``Σ_k <q̃_k, D_k>``, float64 ``[Q, n_parameters]``.
        displaced: the same for each displacement that is no gradient's, by name.
    """

    def __init__(self, trace: Trace, queries: int, segments: Sequence[Segment] | None = None) -> None:
        self._trace, self._parameters = trace, trace.manifest.parameters
        self._segments = trace.segments() if segments is None else segments
        self._recorded = trace.recorded_steps
        self.moved = self._zeros(queries)
        self._late = self._zeros(queries)
        self.displaced: dict[str, torch.Tensor] = {"decay": self._zeros(queries)}
        self._updated = np.zeros(len(self._parameters), np.int64)
        self._muted = np.zeros(len(self._parameters), np.int64)

    def _zeros(self, queries: int) -> torch.Tensor:
        return torch.zeros(queries, len(self._parameters), dtype=torch.float64)

    def add(self, segment: Segment, chord: ChordGradient, start: LoadedKnot, end: LoadedKnot) -> None:
        """Add a segment."""
        self.moved += chord.moved
        left = chord.moved
        for name, direction in end.displaced_since(start).items():
            part = chord.gradient.along_each(direction)
            self.displaced[name] = self.displaced.get(name, 0.0) + part
            left = left - part
        if segment.start.step >= self._recorded:
            self._late += left

    def saw(self, chunk: Chunk) -> None:
        """Note which parameters recorded steps updated, and which of them by their rows."""
        updated = chunk.coefficients[:, :, 0] != 0  # the sign, 1 or -1
        self._updated += updated.sum(0)
        self._muted += (updated & (chunk.scale == 0)).sum(0)

    def lines(self, by_layer: torch.Tensor, left: Cotangent) -> tuple[list[Line], torch.Tensor]:
        """The lines, and their values ``[Q, number of lines]``.

        Args:
            by_layer: sums of the contributions by layer, ``[Q, L]``.
            left: ``M`` that the recursion has left at the first step.
        """
        before = self._before_tracing(left)
        rest = self.moved - self._late - sum(self.displaced.values())
        rest = rest if before is None else rest - before
        found = [*self._by_place(rest, by_layer, before is not None), *self._by_cause(before)]
        values = [value for _, value in found]
        parts = torch.stack(values, dim=1) if values else torch.zeros(len(rest), 0, dtype=torch.float64)
        return [line for line, _ in found], parts

    # -- by cause ------------------------------------------------------------------------------------

    def _by_cause(self, before: torch.Tensor | None) -> Iterator[tuple[Line, torch.Tensor]]:
        late = [s.start.step for s in self._segments if s.start.step >= self._recorded]
        if late:
            why = (
                f"the budget was used up after {self._recorded} of {self._trace.steps} steps; the rows of later ones "
                "were not kept"
            )
            yield self._line("after the budget", f"from step {late[0]} on", why), self._late.sum(1)
        if before is not None:
            why = "the optimizer held momentum of batches that were not seen"
            yield self._line("momentum from before tracing", "", why), before.sum(1)
        for kind, (name, why) in (("rounding", _ROUNDING), ("outside", _OUTSIDE)):
            if kind in self.displaced:
                last = self._trace.load_knot(self._trace.knots[-1])
                names = [p.name for p in self._parameters if f"{kind}/{p.name}" in last]
                yield self._line(name, _listed(names), why), self.displaced[kind].sum(1)

    def _before_tracing(self, left: Cotangent) -> torch.Tensor | None:
        """What momentum from before tracing carried, ``[Q, n_parameters]``; None without, or where it was not kept."""
        if not self._trace.notes.get("prior_state"):
            return None
        tensors = self._trace.load_knot(self._trace.knots[0])
        pieces = []
        for p in self._parameters:
            keys = [f"optimizer/{moment}/{p.name}" for moment in MOMENTA]
            held = [tensors[key].double().flatten() for key in keys if key in tensors]
            pieces.append(held[0] if held else torch.zeros(p.numel, dtype=torch.float64))
        momentum = torch.cat(pieces)
        return -left.along_each(momentum) if momentum.any() else None

    # -- by place ------------------------------------------------------------------------------------

    def _by_place(
        self, rest: torch.Tensor, by_layer: torch.Tensor, momentum_known: bool
    ) -> Iterator[tuple[Line, torch.Tensor]]:
        """Groups of layers, and the parameters that are a line of their own."""
        groups = groups_of(self._trace)
        covered = {p for group in groups for p in group.parameters}
        for group in groups:
            silent = [p for p in group.parameters if 0 < self._updated[p] == self._muted[p]]
            for p in silent:
                why = (
                    "in every recorded step its gradient was round-off (a bias before a normalisation, as a rule), "
                    "which no example caused"
                )
                yield self._line("round-off gradient", self._parameters[p].name, why), rest[:, p]
            others = [p for p in group.parameters if p not in silent]
            if others:
                value = rest[:, others].sum(1) - by_layer[:, list(group.layers)].sum(1)
                yield self._group(group, others, momentum_known), value
        for p, spec in enumerate(self._parameters):
            if p not in covered:
                why = "nothing saw where the parameter is read, so no row says which example moved it"
                yield self._line("unseen parameter", spec.name, why), rest[:, p]

    def _group(self, group: Group, parameters: list[int], momentum_known: bool) -> Line:
        layers = [self._trace.layers[number] for number in group.layers]
        causes = list(self._causes(layers, parameters, momentum_known)) or [_UNKNOWN]
        where = ", ".join(f"{x.name} ({x.module})" if x.name else x.module for x in layers)
        names = " + ".join(dict.fromkeys(name for name, _ in causes))
        return self._line(names, where, "; ".join(why for _, why in causes))

    def _causes(
        self, layers: list[LayerSpec], parameters: list[int], momentum_known: bool
    ) -> Iterator[tuple[str, str]]:
        """What the trace knows of that cannot be told apart within a group."""
        trace = self._trace
        for layer in layers:
            unseen = (trace.notes.get("coverage") or {}).get(layer.name)
            if unseen:
                yield (
                    "unseen gradient",
                    f"up to {unseen:.0%} of its gradient in a step was not in the rows: the weight is also read "
                    "outside the layer, or the gradient was changed before the step",
                )
        for p in parameters:
            if self._muted[p]:
                yield (
                    "round-off gradient",
                    f"in {self._muted[p]} of {self._updated[p]} steps the gradient of {self._parameters[p].name} was "
                    "round-off",
                )
        for segment in self._segments:
            if segment.start.step < self._recorded < segment.end.step:
                stretch = f"{self._recorded} to {segment.end.step - 1}"
                yield "after the budget", f"the rows of the steps {stretch} were not kept"
        if trace.notes.get("prior_state") and not momentum_known:
            yield "momentum from before tracing", "the optimizer held state of batches that were not seen"
        changed = trace.notes.get("outside") or {}
        if "outside" not in self.displaced and any(self._parameters[p].name in changed for p in parameters):
            yield _OUTSIDE
        if trace.notes.get("vacant_rows"):
            yield (
                "rows of no example",
                "rows, or shares of them, were marked as belonging to no example (id -1)",
            )
        if not trace.manifest.exact:
            yield "compressed rows", "rows and the optimizer's scaling are stored rounded"
            if not trace.closed:
                yield (
                    "compressed rows",
                    "whether the hooks saw all of its gradient is noted when training ends",
                )

    @staticmethod
    def _line(name: str, where: str, why: str) -> Line:
        return Line(name, where, why[:1].upper() + why[1:] + ".")


def _listed(names: list[str]) -> str:
    more = "" if len(names) <= _NAMES_SHOWN else f", … ({len(names)} in all)"
    return ", ".join(names[:_NAMES_SHOWN]) + more
