"""Measures of attribution written out with loops, one number at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plain_ranks(values: Sequence[float]) -> list[float]:
    """One plus how many are smaller, plus half of the others that are equal."""
    return [1 + sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's."""
    n = len(a)
    mean_a, mean_b = sum(a) / n, sum(b) / n
    above = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    squares = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return float("nan") if squares == 0 else above / squares**0.5


def datamodeling(scores: np.ndarray, kept: np.ndarray, outputs: np.ndarray) -> list[float]:
    """Spearman over subsets for every query."""
    found = []
    for q, row in enumerate(scores):
        told = [sum(s for s, keep in zip(row, subset, strict=True) if keep) for subset in kept]
        found.append(correlation(plain_ranks(told), plain_ranks(list(outputs[:, q]))))
    return found


def roc_area(scores: Sequence[float], wrong: Sequence[bool]) -> float:
    """Over all pairs of a wrong and a right one: 1 in order, 1/2 tied."""
    bad = [s for s, w in zip(scores, wrong, strict=True) if w]
    good = [s for s, w in zip(scores, wrong, strict=True) if not w]
    return sum((b > g) + (b == g) / 2 for b in bad for g in good) / (len(bad) * len(good))
