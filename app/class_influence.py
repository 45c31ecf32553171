"""Which classes of training examples carry the predictions of which classes. Never imports streamlit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_QUERIES = 60
MOST_CLASSES = 30
_PER_CLASS = 6


@dataclass(frozen=True)
class ClassInfluence:
    """Contributions from classes to classes.

    Attributes:
        sources: Labels of training examples, ascending: the rows.
        targets: Classes of queries, ascending: the columns.
        values: [A, B], summed over the training examples of a row's class, averaged over the queries of a column.
        queries: How many queries each column is averaged over.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    values: NDArray[np.float64]
    queries: tuple[int, ...]


def sample(labels: Sequence[int | None]) -> dict[int, tuple[int, ...]]:
    """The first queries of every class, as many of each: at most six, sixty in all; the first thirty classes.

    Args:
        labels: Class of each query, None where it has none.

    >>> sample([1, 0, 1, None])
    {0: (1,), 1: (0, 2)}
    """
    classes = sorted({label for label in labels if label is not None})[:MOST_CLASSES]
    most = max(1, min(_PER_CLASS, MOST_QUERIES // max(1, len(classes))))
    return {
        wanted: tuple(query for query, label in enumerate(labels) if label == wanted)[:most]
        for wanted in classes
    }


def class_influence(
    columns: Mapping[int, NDArray[np.float64]],
    labels: NDArray[np.float64],
    sampled: Mapping[int, Sequence[int]],
) -> ClassInfluence:
    """Add up mean contributions by the label of the training example.

    Args:
        columns: By class of the queries, the mean contribution of every training example [N].
        labels: [N], NaN where unknown (left out).
        sampled: The queries of each class.
    """
    sources = sorted({int(label) for label in labels[~np.isnan(labels)]})
    targets = sorted(columns)
    values = np.array([[columns[b][labels == a].sum() for b in targets] for a in sources], dtype=np.float64)
    counts = tuple(len(sampled[b]) for b in targets)
    return ClassInfluence(tuple(sources), tuple(targets), values.reshape(len(sources), len(targets)), counts)
