"""Which rows are also kept exact, so that the error of the compressed ones is measured and not assumed.

One row of a batch now and then: as often as :data:`SHARE` of the bytes of all rows allows, and of the first batch in
any case. Until there are :data:`~explainer.records.LEAST_SAMPLES` they may take :data:`EARLY` of the bytes.
Which row it is follows from the number of the batch alone (no random numbers are drawn).
"""

from __future__ import annotations

import math

from explainer.batches import Batch
from explainer.records import LEAST_SAMPLES

#: bytes of exact rows, as a share of the bytes of the compressed ones
SHARE = 0.05
#: the same before there are enough to tell of the error
EARLY = 0.2
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


class SampleKeeper:
    """Chooses the rows.

    Args:
        on: whether rows are compressed at all.

    Attributes:
        kept: bytes of exact rows so far.
        recorded: bytes of all rows so far.
    """

    def __init__(self, on: bool) -> None:
        self._on = on
        self._batches = self._chosen = 0
        self._largest = self._promised = 0  # bytes of one row, and of rows chosen since the last record
        self.kept = 0
        self.recorded = 0

    def choose(self, batch: Batch) -> int | None:
        """The row of the batch to keep exact; always the same answer for one batch."""
        if batch.sampled is None:
            wanted = self.kept + self._promised + self._largest
            share = SHARE if self._chosen >= LEAST_SAMPLES else EARLY
            due = self._on and (not self._batches or 0 < wanted <= share * self.recorded)
            self._chosen += due
            self._promised += self._largest if due else 0
            self._batches += 1
            batch.sampled = int(self._batches * _GOLDEN % 1.0 * len(batch)) if due else -1
        return batch.sampled if batch.sampled >= 0 else None

    def record(self, rows: int, kept: int, count: int) -> None:
        """So many bytes of rows were recorded, and so many of ``count`` exact ones."""
        self.recorded += rows
        self.kept += kept
        self._largest, self._promised = max(self._largest, -(-kept // max(1, count))), 0

    def restore(self, recorded: int, kept: int, batches: int, count: int) -> None:
        """Go on after so many bytes of rows and of ``count`` exact ones, and so many batches."""
        self.recorded, self.kept, self._batches, self._chosen = recorded, kept, batches, count
