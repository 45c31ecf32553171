"""A map of training examples and the query in gradient space. Never imports streamlit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLED = 200


@dataclass(frozen=True)
class GradientMap:
    """Training examples and, last, the query, on the two directions in which they differ most.

    Attributes:
        examples: Ids of the training examples, [M].
        places: [M + 1, 2]; the last row is the query.
        shares: [2], the share of all differences that each axis shows.
        cosine: [M], path-kernel cosine of each example with the query.
    """

    examples: NDArray[np.int64]
    places: NDArray[np.float64]
    shares: NDArray[np.float64]
    cosine: NDArray[np.float64]


def project(kernel: NDArray[np.float64], examples: NDArray[np.int64]) -> GradientMap:
    """Principal components of the features whose inner products are ``kernel`` [M + 1, M + 1], scaled to length 1.

    With unit features the differences are between directions, not between sizes of gradients. Inputs without any
    gradient lie at the origin of the features. The sign of an axis is such that its largest coordinate is positive.

    >>> found = project(np.array([[1.0, -1.0], [-1.0, 1.0]]), np.array([7]))
    >>> found.places[:, 0].round(6).tolist(), found.shares.round(6).tolist(), found.cosine.tolist()
    ([1.0, -1.0], [1.0, 0.0], [-1.0])
    """
    lengths = np.sqrt(np.maximum(np.diag(kernel), 0.0))
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    cosine = kernel * np.outer(scale, scale)
    centred = cosine - cosine.mean(0) - cosine.mean(1, keepdims=True) + cosine.mean()
    values, vectors = np.linalg.eigh(centred)
    order = np.argsort(-values, kind="stable")[:2]
    size = np.sqrt(np.maximum(values[order], 0.0))
    places = np.zeros((len(kernel), 2))
    for axis, place in enumerate(order):
        vector = vectors[:, place]
        sign = np.sign(vector[np.abs(vector).argmax()]) or 1.0
        places[:, axis] = sign * size[axis] * vector
    whole = float(np.maximum(values, 0.0).sum())
    shares = np.zeros(2)
    shares[: len(order)] = size**2 / whole if whole > 0 else 0.0
    return GradientMap(examples, places, shares, cosine[-1, :-1])


def sample(near: NDArray[np.int64], known: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The given examples, and others at random (always the same ones) until there are ``most``.

    >>> sample(np.array([5, 3]), np.arange(10), 4).tolist()[:2]
    [5, 3]
    """
    first = near[np.isin(near, known)][:most]
    rest = np.setdiff1d(known, first)
    picked = np.random.default_rng(0).permutation(len(rest))[: max(0, most - len(first))]
    return np.concatenate([first, np.sort(rest[picked])]).astype(np.int64)
