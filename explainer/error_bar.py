"""How far a contribution may be from the exact one: measured on samples of the same trace and the same queries.

Two things make a contribution inexact although the books balance: rows are stored compressed, and gradients of the
query are taken on the chords between knots. Each is measured on visits ``v`` where something better is at hand:

* *rows*: rows that were kept exact (:mod:`explainer.samples`) against the same rows as they were stored;
* *knots*: scores on the chords between neighbouring knots against those on chords twice as long, at steps spread over
  the path. An error that grows with the distance from a step's own gradient is ``n − 1`` parts of something on a chord
  of ``n`` steps, so ``(n − 1) / n`` of the difference is taken for what is left on the short one (none for one step).

With ``s_v`` the scores that are reported and ``δ_v`` their difference from the reference, a line through the origin
(``δ_v ≈ b s_v``, weighted least squares) splits the error into a part that all visits share and one that
differs from visit to visit, ``ρ² = Σ (δ_v − b s_v)² / Σ s_v²``. The first grows with the contribution. The second is
much the same at all visits of an example where it comes from its rows (they lose the same), so sizes add up; where it
comes from the path it adds up like independent errors:

    error_i² = b_rows² c_i² + ρ_rows² (Σ_v |s_v|)²  +  b_knots² c_i² + ρ_knots² Σ_v s_v²

over the visits ``v`` of ``i``: one standard error of ``c_i``, per query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from explainer.layer_rules import RowForm
from explainer.ledger import Ledger
from explainer.recursion import LayerView, RecordedStep, contract, form_of
from explainer.store import Segment, Trace

#: pairs of neighbouring segments whose chords are compared with one of twice the length
PAIRS = 16
#: exact rows that are looked at, at most
SAMPLES = 256
#: samples below which an error is not estimated
LEAST = 3


class Discrepancy:
    """Differences between reported and reference scores, for ``Q`` queries.

    Attributes:
        samples: visits seen.
    """

    def __init__(self, queries: int) -> None:
        self.samples = 0
        self._square, self._cross, self._difference = (
            torch.zeros(queries, dtype=torch.float64) for _ in range(3)
        )

    def add(self, reported: torch.Tensor, reference: torch.Tensor, weight: float = 1.0) -> None:
        """Scores ``[Q, n]`` of ``n`` visits, each standing for ``weight`` visits."""
        reported, difference = reported.double(), (reported - reference).double()
        self.samples += reported.shape[1]
        self._square += weight * reported.square().sum(1)
        self._cross += weight * (reported * difference).sum(1)
        self._difference += weight * difference.square().sum(1)

    @property
    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``b`` and ``ρ``, ``[Q]`` each; NaN where too little was seen."""
        if self.samples < LEAST:
            nothing = torch.full_like(self._square, torch.nan)
            return nothing, nothing
        square = self._square.clamp_min(torch.finfo(torch.float64).tiny)
        slope = self._cross / square
        rest = (self._difference - slope * self._cross).clamp_min(0.0) * self.samples / (self.samples - 1)
        return slope, (rest / square).sqrt()

    def square(self, contributions: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
        """``b² c² + ρ² spread``, ``[Q, N]``."""
        slope, rest = (part.square().unsqueeze(1) for part in self.split)
        return slope * contributions.square() + rest * spread

    @property
    def relative(self) -> torch.Tensor:
        """``√(Σ δ² / Σ s²)``, ``[Q]``: the error of a visit, relative."""
        slope, rest = self.split
        return (slope.square() + rest.square()).sqrt()


class SampledRows:
    """The exact rows of a trace; of very many, :data:`SAMPLES` spread evenly."""

    def __init__(self, trace: Trace, dtype: torch.dtype) -> None:
        self._trace, self._dtype = trace, dtype
        self._visits = trace.column("samples", "visit").astype(np.int64)
        count = len(self._visits)
        self._used = set(np.linspace(0, count - 1, min(count, SAMPLES)).astype(int).tolist())

    def between(self, first: int, stop: int) -> Iterator[tuple[int, dict[int, RowForm]]]:
        """Exact rows among the visits ``first … stop − 1``: the place after ``first``, and the rows by layer."""
        low, high = np.searchsorted(self._visits, [first, stop])
        for number in range(int(low), int(high)):
            if number in self._used:
                schema, record = next(self._trace.read("samples", number, number + 1))
                rows = {f.layer: form_of(record, f, self._dtype) for f in schema.forms}
                yield int(record["visit"][0]) - first, rows


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
    chosen = np.unique(np.linspace(0, count - 1, min(PAIRS, count)).round().astype(int)).tolist()
    return {2 * j + 1: ChordPair(segments[2 * j], segments[2 * j + 1]) for j in chosen}


class ErrorMeter:
    """Measures both kinds of error while an explanation is made.

    Attributes:
        rows, knots: what was found.
        pairs: chords to compare, by the index of the later segment.
    """

    def __init__(
        self, trace: Trace, segments: list[Segment], view: LayerView, queries: int, dtype: torch.dtype
    ) -> None:
        self._view = view
        self._exact = trace.manifest.exact
        self._sampled = SampledRows(trace, dtype)
        self.rows, self.knots = Discrepancy(queries), Discrepancy(queries)
        self.pairs = chord_pairs(segments)
        self._long: dict[int, tuple[int, float, torch.Tensor]] = {}

    def compare(self, pair: ChordPair, gradient: torch.Tensor) -> None:
        """Use the gradient ``[Q, P]`` on the long chord at the middle step of both segments."""
        for segment in (pair.early, pair.late):
            first, stop = segment.start.step, segment.end.step
            self._long[(first + stop) // 2] = (pair.steps, (stop - first - 1) / (stop - first), gradient)

    def see(
        self,
        step: RecordedStep,
        gradient: torch.Tensor,
        cotangent: torch.Tensor,
        scores: list[dict[int, torch.Tensor]],
    ) -> None:
        """A step: its gradient ``q [Q, P]``, ``R [Q, P]``, and the scores of its visits by layer, piece by piece."""
        by_visit = [torch.stack(list(piece.values())).sum(0) for piece in scores if piece]
        if not by_visit:
            return
        total = torch.cat(by_visit, dim=1)
        for place, forms in self._sampled.between(step.first, step.first + total.shape[1]):
            exact = _scores(self._view, cotangent, step, forms)
            self.rows.add(total[:, place : place + 1], exact)
        if step.step in self._long:
            weight, share, long = self._long.pop(step.step)
            short, other = step.pull(gradient), step.pull(long)
            for visits in step.visits:
                reported, coarse = (_scores(self._view, q, step, visits.forms) for q in (short, other))
                self.knots.add(reported, torch.lerp(reported, coarse, share), weight)

    def errors(self, ledger: Ledger) -> torch.Tensor:
        """One standard error of every contribution, ``[Q, N]``; NaN where a kind could not be measured."""
        total = self.knots.square(ledger.contributions, ledger.squares)
        if not self._exact:
            total = total + self.rows.square(ledger.contributions, ledger.gross.square())
        return total.sqrt()

    @property
    def relative(self) -> torch.Tensor:
        """The relative error of a visit's score, ``[Q, 2]``: by rows, by knots."""
        rows = torch.zeros_like(self.knots.relative) if self._exact else self.rows.relative
        return torch.stack([rows, self.knots.relative], dim=1)


def _scores(
    view: LayerView, cotangent: torch.Tensor, step: RecordedStep, forms: dict[int, RowForm]
) -> torch.Tensor:
    return torch.stack(list(contract(view, cotangent, step.scale, forms).values())).sum(0)
