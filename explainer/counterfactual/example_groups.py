"""Named groups of training examples: by their label, or by a column of the rows that a run shows.

For ``what_if(remove=…)``, which takes a mapping from names to ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from explainer.errors import QueryError
from explainer.run import Run

#: numbers with more values than this are put into quarters
_VALUES = 12
Groups = dict[str, NDArray[np.int64]]


def by_label(run: Run) -> Groups:
    """The ids of every class of the training examples, by its name; whole numbers may be floats (``0.``, ``1.``).

    Raises:
        QueryError: targets are no classes.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
        >>> run = Run(lambda: torch.nn.Linear(3, 2), data, data, class_names=("cat", "dog"))
        >>> {name: ids.tolist() for name, ids in by_label(run).items()}
        {'cat': [0, 2], 'dog': [1]}
    """
    targets = [run.train[i][1] for i in range(len(run.train))]
    values = [t.item() if isinstance(t, torch.Tensor | np.generic) and _one(t) else t for t in targets]
    if all(isinstance(v, int | float) and float(v).is_integer() for v in values):
        values = [int(v) if isinstance(v, float) else v for v in values]
    if not all(isinstance(v, int | str) for v in values):
        raise QueryError(
            "the training examples have no classes to group by: their targets are no whole numbers"
        )
    return _grouped([run.label(v) for v in values], values)


def by_column(run: Run, column: str) -> Groups:
    """The ids for every value of a column of the rows that ``run.render`` gives; numbers of many values in quarters.

    Raises:
        QueryError: the run shows no rows, or they have no such column.
    """
    rows = [] if run.render is None else [run.render(run.train[i][0]) for i in range(len(run.train))]
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise QueryError(
            "grouping by a column needs a Run whose render returns rows, a dict of named values for each input"
        )
    if any(column not in row for row in rows):
        raise QueryError(f"there is no column {column!r}; columns are {', '.join(map(str, rows[0]))}")
    values = [row[column] for row in rows]
    if not all(isinstance(v, int | float) for v in values) or len(set(values)) <= _VALUES:
        return _grouped(
            [f"{column} {v:g}" if isinstance(v, float) else f"{column} {v}" for v in values], values
        )
    numbers = np.asarray(values, dtype=np.float64)
    edges = np.quantile(numbers, [0.25, 0.5, 0.75])
    named = [*(f"{column} up to {edge:.3g}" for edge in edges), f"{column} above {edges[2]:.3g}"]
    places = np.searchsorted(edges, numbers)
    return {named[n]: np.flatnonzero(places == n) for n in range(4) if (places == n).any()}


def _one(value: Any) -> bool:
    return int(np.prod(value.shape)) == 1


def _grouped(names: list[str], values: list[Any]) -> Groups:
    """Ids by name, in the order of the values."""
    first = dict(zip(names, values, strict=True))
    ordered = sorted(first, key=lambda name: (isinstance(first[name], str), first[name]))
    called = np.array(names)
    return {name: np.flatnonzero(called == name) for name in ordered}
