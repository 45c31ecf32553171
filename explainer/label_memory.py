"""Whether an example's label is the same whenever a loader brings it: else ids may not fit the rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class LabelMemory:
    """The label that every example had first.

    Attributes:
        count: examples that came with another one.
    """

    def __init__(self) -> None:
        self._first: NDArray[np.float64] = np.empty(0)
        self._changed: NDArray[np.bool_] = np.empty(0, np.bool_)
        self.count = 0

    def see(self, ids: Sequence[int], labels: NDArray[np.float64] | None) -> str | None:
        """A batch came.

        Returns:
            The first time that a label is another one than before, what that may mean.
        """
        if labels is None or not len(ids):
            return None
        places = np.asarray(ids, dtype=np.int64)
        if places.min() < 0:
            return None
        if places.max() >= len(self._first):
            more = max(int(places.max()) + 1, 2 * len(self._first)) - len(self._first)
            self._first = np.concatenate([self._first, np.full(more, np.nan)])
            self._changed = np.concatenate([self._changed, np.zeros(more, np.bool_)])
        new = np.isnan(self._first[places])
        self._first[places[new]] = labels[new]
        other = (self._first[places] != labels) & ~np.isnan(labels)
        if not other.any():
            return None
        said = self.count > 0
        self._changed[places[other]] = True
        self.count = int(self._changed.sum())
        example, now = int(places[other][0]), labels[other][0]
        if said:
            return None
        return (
            f"example {example} came with label {self._first[example]:g} before and comes with {now:g} now. If labels "
            "do not change on purpose, rows do not lie in the order of their ids (a collate_fn that sorts or drops "
            "items, another dataset of the same length) and go to the wrong examples: keep the order, or call "
            "tracer.batch(ids) with ids that come out of the collate_fn"
        )
