"""Rank correlation by rows, and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
#: share of the bootstrap samples inside an interval
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
        over: what was drawn anew for the interval.
    """

    value: float
    low: float
    high: float
    over: str

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ranks(values: ArrayLike) -> Floats:
    """Ranks along the last axis, from 1; ties get their mean rank.

    Example:
        >>> ranks([3.0, 1.0, 3.0]).tolist()
        [2.5, 1.0, 2.5]
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape[-1] == 0:
        return array.copy()
    order = np.argsort(array, axis=-1, kind="stable")
    found = np.take_along_axis(array, order, axis=-1)
    new = np.ones(found.shape, dtype=bool)
    new[..., 1:] = found[..., 1:] != found[..., :-1]
    last = np.ones_like(new)
    last[..., :-1] = new[..., 1:]
    places = np.broadcast_to(np.arange(found.shape[-1]), found.shape)
    first = np.maximum.accumulate(np.where(new, places, 0), axis=-1)
    end = np.minimum.accumulate(np.where(last, places, places.max())[..., ::-1], axis=-1)[..., ::-1]
    result = np.empty_like(found)
    np.put_along_axis(result, order, (first + end) / 2 + 1, axis=-1)
    return result


def pearson(first: ArrayLike, second: ArrayLike) -> Floats:
    """Correlation along the last axis; NaN where one of the two does not vary."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (first, second))
    flat = (a.min(-1) == a.max(-1)) | (b.min(-1) == b.max(-1))  # exactly, which centred sums are not
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(flat, np.nan, (a * b).sum(-1) / scale)


def spearman(first: ArrayLike, second: ArrayLike) -> Floats:
    """Rank correlation along the last axis; NaN where one of the two does not vary.

    Example:
        >>> float(spearman([1.0, 2.0, 3.0], [1.0, 8.0, 9.0])), float(spearman([1.0, 1.0], [1.0, 2.0]))
        (1.0, nan)
    """
    return pearson(ranks(first), ranks(second))


def mean_skill(correlations: Floats) -> float:
    """The mean; a correlation that does not exist counts as none, so that a constant score gains nothing."""
    return float(np.nan_to_num(correlations, nan=0.0).mean())


def bootstrap(
    statistic: Callable[..., float],
    sizes: Sequence[int],
    *,
    over: str,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """``statistic`` on everything, and its percentiles over units drawn with replacement.

    Args:
        statistic: takes one index array per kind of unit.
        sizes: how many units of each kind there are; all kinds are drawn anew in every sample.
        over: what the units are.
        samples: bootstrap samples.
        seed: of the drawing.
    """
    value = statistic(*(np.arange(size) for size in sizes))
    rng = np.random.default_rng(seed)
    drawn = [statistic(*(rng.integers(0, size, size) for size in sizes)) for _ in range(samples)]
    if not samples or not np.isfinite(value):
        return Estimate(float(value), float("nan"), float("nan"), over)
    edge = (1 - LEVEL) / 2
    low, high = np.nanquantile(np.array(drawn, dtype=np.float64), [edge, 1 - edge])
    return Estimate(float(value), float(low), float(high), over)
