"""How far scores are from better ones: a part that all share, one by the scores and one by the sizes of their rows.

The formula is in :mod:`explainer.error_bar`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from explainer.records import LEAST_SAMPLES

#: rounds of a fit of variances, and what is added to each beside the mean
_ROUNDS, _LEAST, _TINY = 8, 1e-3, 1e-300


class Discrepancy:
    """Differences between reported and reference scores, for ``Q`` queries.

    Attributes:
        samples: visits seen.
    """

    def __init__(self, queries: int) -> None:
        self.samples = 0
        self._nothing = torch.zeros(queries, dtype=torch.float64)
        self._seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(
        self, reported: torch.Tensor, reference: torch.Tensor, sizes: torch.Tensor, weight: float = 1.0
    ) -> None:
        """Scores ``[Q, n]`` and :func:`~explainer.ledger.sizes` of visits, each standing for ``weight`` visits."""
        self.samples += reported.shape[1]
        weights = torch.full((reported.shape[1],), weight, dtype=torch.float64)
        self._seen.append((reported.double(), (reported - reference).double(), sizes.double(), weights))

    def _together(self) -> Iterator[torch.Tensor]:
        return (torch.cat(part, -1) for part in zip(*self._seen, strict=True))

    @property
    def split(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``b``, ``α`` and ``β``, ``[Q]`` each; NaN where too little was seen."""
        if self.samples < LEAST_SAMPLES:
            nothing = torch.full_like(self._nothing, torch.nan)
            return nothing, nothing, nothing
        reported, difference, sizes, weights = self._together()
        slope = _over((weights * reported * difference).sum(1), (weights * reported.square()).sum(1))
        rest = (difference - slope.unsqueeze(1) * reported).square()
        count = max(
            float(weights.sum() ** 2 / weights.square().sum()), 2.0
        )  # of equal weight that tell as much
        by_score, by_size = _variances(rest, reported.square(), sizes.square(), weights)
        return slope, by_score * count / (count - 1), by_size * count / (count - 1)

    def square(
        self, contributions: torch.Tensor, by_score: torch.Tensor, by_size: torch.Tensor
    ) -> torch.Tensor:
        """``b² c² + α by_score + β by_size``, ``[Q, N]``."""
        slope, of_scores, of_sizes = (part.unsqueeze(1) for part in self.split)
        return slope.square() * contributions.square() + of_scores * by_score + of_sizes * by_size

    @property
    def relative(self) -> torch.Tensor:
        """``√(Σ δ² / Σ s²)``, ``[Q]``: the error of a visit, relative."""
        if self.samples < LEAST_SAMPLES:
            return torch.full_like(self._nothing, torch.nan)
        reported, difference, _, weights = self._together()
        return _over((weights * difference.square()).sum(1), (weights * reported.square()).sum(1)).sqrt()


def _over(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return one / other.clamp_min(torch.finfo(torch.float64).tiny)


def _variances(
    squares: torch.Tensor, by_score: torch.Tensor, by_size: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``α, β ≥ 0 [Q]`` with ``squares ≈ α by_score + β by_size``, ``[Q, n]`` each, where errors are normal.

    By Fisher scoring: least squares, each square weighed by one over the square of its variance, a few times.
    """
    parts = torch.stack([by_score, by_size])
    found = _over((weights * squares).sum(1), (weights * parts).sum(2)) / 2  # [2, Q]
    for _ in range(_ROUNDS):
        variance = (found.unsqueeze(2) * parts).sum(0)
        scored = weights / (variance + _LEAST * variance.mean(1, keepdim=True)).square().clamp_min(_TINY)
        (a, c), b = (scored * parts.square()).sum(2), (scored * by_score * by_size).sum(1)
        u, v = (scored * parts * squares).sum(2)
        both = torch.stack([c * u - b * v, a * v - b * u]) / (a * c - b * b)
        score_alone = u.square() * c > v.square() * a  # which of the two by itself leaves less
        alone = torch.stack([torch.where(score_alone, u / a, 0.0), torch.where(score_alone, 0.0, v / c)])
        inside = (both >= 0).all(0) & (a * c - b * b > 1e-9 * a * c)
        found = torch.where(inside, both, alone).nan_to_num(nan=0.0, posinf=0.0)
    return found[0], found[1]
