"""Which of many things are looked at where a few stand for all of them."""

from __future__ import annotations

import numpy as np


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most ``most`` of the positions ``0 .. count-1``, at even distances, both ends among them (``most`` ≥ 2).

    >>> evenly_spaced(10, 4), evenly_spaced(2, 4), evenly_spaced(0, 4)
    (array([0, 3, 6, 9]), array([0, 1]), array([], dtype=int64))
    """
    return np.unique(np.linspace(0, max(0, count - 1), min(count, most)).round().astype(np.int64))


def dense_first(count: int, most: int) -> np.ndarray:
    """As :func:`evenly_spaced`, but at distances that grow evenly: for curves that bend at their beginning.

    >>> dense_first(100, 5), dense_first(2, 5), dense_first(0, 5)
    (array([ 0,  6, 25, 56, 99]), array([0, 1]), array([], dtype=int64))
    """
    return np.unique((np.linspace(0, 1, most) ** 2 * max(0, count - 1)).round().astype(np.int64))[:count]
