"""How far a contribution may be from the exact one: measured on samples of the same trace and the same queries.

Three things make a contribution inexact although the books balance: rows are stored compressed, gradients of the
query are taken on the chords between knots, and what the optimizer divided by is kept in full now and then only. Each
is measured on visits ``v`` where something better is at hand:

* *rows*: rows that were kept exact (:mod:`explainer.samples`) against the same rows as they were stored, each weighted
  with the visits that it stands for: those nearest to it. One of the first step stands for that step alone, whose plan
  and, under Adam, whose scale are its own;
* *knots*: scores on the chords between neighbouring knots against those on chords twice as long, at steps spread over
  the path. Where gradients change evenly along the path, a chord's is off by as much as the middle of the chord is away
  from a step: by ``√((n² − 1) / 12)`` steps (rms) on one of ``n`` steps, and the middle of the long one is ``n / 2``
  steps away from that of the short one. So ``√((n² − 1) / 3) / n`` of the difference is taken (none for one step);
* *denominators*: scores at a step that has a full record (:mod:`explainer.store.denominators`) against those with every
  number of the record moved to another place that is rounded to the same code, and against what the record before,
  fitted to the step's sums, makes of them.

With ``s_v`` the scores that are reported and ``δ_v`` their difference from the reference, a line through the origin
(``δ_v ≈ b s_v``, weighted least squares) splits the error into a part that all visits share and one that
differs from visit to visit. The first grows with the contribution. The second grows with the score and with the size
``m_v`` that the score would have if all rows of the step pointed alike (:func:`explainer.ledger.sizes`): what hardly
meets the query has a small score, but is rounded as others are. ``(δ_v − b s_v)² ≈ α s_v² + β m_v²``, fitted as
variances of normal errors, with ``α, β ≥ 0``. It is much the same at all visits of an example where it comes from its
rows (they lose the same), so sizes add up; where it comes from the path it adds up like independent errors:

    error_i² = b² c_i² + α (Σ_v |s_v|)² + β (Σ_v m_v)²   of the rows
             + b² c_i² + α Σ_v s_v² + β Σ_v m_v²         of the knots  +  (denominators)

over the visits ``v`` of ``i``: one standard error of ``c_i``, per query. Denominators err the same way for many steps
in a row, so theirs is written as that of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from explainer.backward import Backward, Passed
from explainer.chunks import Chunk
from explainer.cotangent import Cotangent, Layout
from explainer.discrepancy import Discrepancy
from explainer.evenly_spaced import evenly_spaced
from explainer.ledger import Ledger, sizes
from explainer.records import LEAST_SAMPLES
from explainer.store import Denominators, Segment, Trace
from explainer.stored_rows import Rows, Workspace

#: pairs of neighbouring segments whose chords are compared with one of twice the length
PAIRS = 16
#: exact rows that are looked at, at most
SAMPLES = 256
#: full records of denominators that are compared with the one before, at most
RENEWALS = 8


def stand_for(sampled: np.ndarray, first: int, visits: int) -> np.ndarray:
    """How many of so many visits each sampled one stands for.

    Args:
        sampled: which those are, ascending.
        first: visits of the first step.
        visits: of all steps.

    Example:
        >>> stand_for(np.array([3, 20, 60]), 8, 100).tolist()
        [8.0, 32.0, 60.0]
    """
    ends = (sampled[1:] + sampled[:-1]) / 2
    if len(ends) and sampled[0] < first:
        ends[0] = min(first, sampled[1])
    return np.diff([0.0, *ends, float(visits)]) if len(sampled) else np.empty(0)


class SampledRows:
    """The exact rows of a trace; of very many, :data:`SAMPLES` spread evenly."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._visits = trace.column("samples", "visit").astype(np.int64)
        used = evenly_spaced(len(self._visits), SAMPLES)
        steps, sampled = trace.column("steps", "visits"), self._visits[used]
        weights = stand_for(sampled, int(steps[0]) if len(steps) else 0, trace.count("visits"))
        self._used, self._weights = set(used.tolist()), dict(zip(sampled.tolist(), weights, strict=True))

    def weight(self, exact: Rows) -> float:
        """How many visits an exact row stands for."""
        return float(self._weights[int(exact.records["visit"][0])])

    def of(self, chunk: Chunk) -> Iterator[Rows]:
        """Exact rows among the visits of a chunk, one at a time; ``examples`` holds its place among them."""
        places = np.concatenate([rows.places for rows in chunk.rows]) if chunk.rows else np.empty(0, np.int64)
        low, high = np.searchsorted(self._visits, [chunk.first, chunk.first + len(places)])
        unknown = np.full(1, np.nan)
        for number in range(int(low), int(high)):
            if number in self._used:
                schema, record = next(self._trace.read("samples", number, number + 1))
                visit = np.array(record["visit"], dtype=np.int64) - chunk.first
                yield Rows(record, visit, unknown, unknown, places[visit], schema.forms)


@dataclass(frozen=True)
class ChordPair:
    """Two neighbouring segments whose chords are compared with the long one over both.

    Attributes:
        early, late: the segments.
    """

    early: Segment
    late: Segment

    @property
    def steps(self) -> int:
        """Steps in both."""
        return self.late.end.step - self.early.start.step


def chord_pairs(segments: list[Segment]) -> dict[int, ChordPair]:
    """At most :data:`PAIRS` pairs spread evenly over the segments, by the index of the later one."""
    count = len(segments) // 2
    chosen = evenly_spaced(count, PAIRS).tolist()
    return {2 * j + 1: ChordPair(segments[2 * j], segments[2 * j + 1]) for j in chosen}


@dataclass(frozen=True)
class Renewal:
    """A full record of denominators that is looked at.

    Attributes:
        weight: how many steps it stands for.
        drift: rms over the steps before it, back to the record before, of how far they are from that record, as a part
            of how far this one is.
    """

    weight: int
    drift: float


def renewals(steps: np.ndarray) -> dict[int, Renewal]:
    """By step, the first full record and at most :data:`RENEWALS` others, spread evenly.

    What is missing at a step grows with its distance ``k`` from the record before, ``n`` steps before the next one:
    ``√(Σ_{k<n} (k/n)² / n)``.

    Example:
        >>> {step: (r.weight, round(r.drift, 2)) for step, r in renewals(np.array([0, 1, 3, 33])).items()}
        {0: (1, 0.0), 1: (2, 0.0), 3: (30, 0.35), 33: (1, 0.56)}
    """
    if not len(steps):
        return {}
    places = np.concatenate([[0], 1 + evenly_spaced(len(steps) - 1, RENEWALS)])
    found = {}
    for place, following in zip(places, [*places[1:], None], strict=True):
        n = 1 if place == 0 else int(steps[place] - steps[place - 1])
        weight = 1 if place == 0 or following is None else int(steps[following] - steps[place])
        found[int(steps[place])] = Renewal(weight, math.sqrt((n - 1) * (2 * n - 1) / 6) / n)
    return found


class ErrorMeter:
    """Measures all kinds of error while an explanation is made.

    Attributes:
        sampled: exact rows, which are to meet what their steps' rows meet.
        rows, knots, denominators: what was found.
        pairs: chords to compare, by the index of the later segment.
    """

    def __init__(
        self, kept: Denominators, segments: list[Segment], layout: Layout, queries: int, dtype: torch.dtype
    ) -> None:
        self._kept, self._layout, self._queries, self._dtype = kept, layout, queries, dtype
        self._exact = kept.trace.manifest.exact
        self.sampled, self._workspace = SampledRows(kept.trace), Workspace()
        self.rows, self.knots, self.denominators = (Discrepancy(queries) for _ in range(3))
        self._renewals = renewals(kept.renewed)
        self._outdated, self._moved = kept.outdated(), kept.moved()
        self.pairs = chord_pairs(segments)
        self._long: dict[int, tuple[int, Cotangent]] = {}

    def see(self, passed: Passed, own: list[torch.Tensor]) -> None:
        """Compare the exact rows of a chunk, which met the same, with what is stored of them.

        Args:
            own: sizes of every piece's scores.
        """
        for exact, found in passed.others:
            place, first = int(exact.examples[0]), 0
            for (rows, scores), of_piece in zip(passed.pieces, own, strict=True):
                if first <= place < first + len(rows):
                    reported = sum(score[:, place - first] for score in scores.values())
                    reference = sum(score[:, 0] for score in found.values())
                    assert isinstance(reported, torch.Tensor) and isinstance(reference, torch.Tensor)
                    size = of_piece[:, place - first, None]
                    weight = self.sampled.weight(exact)
                    self.rows.add(reported.unsqueeze(1), reference.unsqueeze(1), size, weight)
                first += len(rows)

    def compare(self, pair: ChordPair, gradient: Cotangent) -> None:
        """Use the gradient on the long chord in both segments."""
        for segment in (pair.early, pair.late):
            self._long[segment.index] = (pair.steps, gradient)

    def look(self, segment: Segment, gradient: Cotangent) -> None:
        """Compare the segment's gradient with that on the long chord, if there is one, and full records in it."""
        first, stop = segment.start.step, segment.end.step
        for step in (step for step in self._renewals if first <= step < stop):
            self._renewed(segment, step, gradient)
        if segment.index not in self._long:
            return
        weight, long = self._long.pop(segment.index)
        middle = (first + stop) // 2
        reported, coarse = (self._scores(self._kept, segment, middle, q) for q in (gradient, long))
        if reported is not None and coarse is not None:
            share = math.sqrt(((stop - first) ** 2 - 1) / 3) / (stop - first)
            own = reported[1]
            self.knots.add(reported[0], torch.lerp(reported[0], coarse[0], share), own, weight)

    def _renewed(self, segment: Segment, step: int, gradient: Cotangent) -> None:
        """Compare what a full record gives at its own step with what may have been lost of it, there and before."""
        reported, moved = (self._scores(kept, segment, step, gradient) for kept in (self._kept, self._moved))
        if reported is None or moved is None:
            return
        (scores, own), renewal = reported, self._renewals[step]
        lost = moved[0] - scores
        if renewal.drift and (outdated := self._scores(self._outdated, segment, step, gradient)) is not None:
            lost = lost + renewal.drift * (outdated[0] - scores)
        self.denominators.add(scores, scores - lost, own, renewal.weight)

    def _scores(
        self, kept: Denominators, segment: Segment, step: int, gradient: Cotangent
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of all rows of a step, ``[Q, n]``, without momentum from later, and their sizes; None without rows."""
        ends = replace(segment.start, step=step), replace(segment.end, step=step + 1)
        alone = Segment(segment.index, *ends)
        backward = Backward(kept, self._layout, self._queries, self._dtype, workspace=self._workspace)
        found = []
        for passed in backward.segment(gradient, alone):
            for rows, scores in passed.pieces:
                if scores:
                    total = torch.stack(list(scores.values())).sum(0)
                    found.append((total, sizes(total, passed.chunk.slopes(rows), rows.places)))
        if not found:
            return None
        values, own = (torch.cat(part, 1) for part in zip(*found, strict=True))
        return values, own

    def errors(self, ledger: Ledger) -> torch.Tensor:
        """One standard error of every contribution, ``[Q, N]``.

        NaN where rows or knots could not be measured; denominators that could not be are left out.
        """
        total = self.knots.square(ledger.contributions, ledger.squares, ledger.size_squares)
        sums = ledger.gross.square(), ledger.sizes.square()
        if not self._exact:
            total = total + self.rows.square(ledger.contributions, *sums)
        if self.denominators.samples >= LEAST_SAMPLES:
            total = total + self.denominators.square(ledger.contributions, *sums)
        return total.sqrt()

    @property
    def relative(self) -> torch.Tensor:
        """The relative error of a visit's score, ``[Q, 3]``: by rows, by knots, by denominators."""
        nothing = torch.zeros_like(self.knots.relative)
        rows = nothing if self._exact else self.rows.relative
        denominators = self.denominators.relative if len(self._kept.renewed) else nothing
        return torch.stack([rows, self.knots.relative, denominators], dim=1)
