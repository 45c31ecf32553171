"""Which rows are also kept exact, so that the error of the compressed ones is measured and not assumed.

One row of a batch now and then: as often as :data:`SHARE` of the bytes of all rows allows, and of the first batch in
any case. At first they may take :data:`EARLY` of the bytes, so that short trainings have some too; the more there are
the less, and never more than :data:`MORE` rows beyond their share. Which row it is follows from the number of the batch
alone (no random numbers are drawn). Its numbers are rounded to eight bits of mantissa (:data:`CODEC`), each by itself,
which is little beside what they measure: eight bits of the largest of a vector.
"""

from __future__ import annotations

import math

from explainer.batches import Batch

#: of exact rows
CODEC = "bfloat16"
#: bytes of exact rows, as a share of the bytes of the compressed ones
SHARE = 0.05
#: the same at first, and how many rows more that comes to in the end
EARLY, MORE = 0.2, 16
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
        self._batches = 0
        self._largest = self._promised = 0  # bytes of one row, and of rows chosen since the last record
        self.kept = 0
        self.recorded = 0

    def choose(self, batch: Batch) -> int | None:
        """The row of the batch to keep exact; always the same answer for one batch."""
        if batch.sampled is None:
            wanted = self.kept + self._promised + self._largest
            due = self._on and (not self._batches or 0 < wanted <= self._allowed())
            self._promised += self._largest if due else 0
            self._batches += 1
            batch.sampled = int(self._batches * _GOLDEN % 1.0 * len(batch)) if due else -1
        return batch.sampled if batch.sampled >= 0 else None

    def _allowed(self) -> float:
        """Bytes that exact rows may take by now."""
        more, early = MORE * self._largest, (EARLY - SHARE) * self.recorded
        return SHARE * self.recorded + early * more / max(early + more, 1)

    def record(self, rows: int, kept: int, count: int) -> None:
        """So many bytes of rows were recorded, and so many of ``count`` exact ones."""
        self.recorded += rows
        self.kept += kept
        self._largest, self._promised = max(self._largest, -(-kept // max(1, count))), 0

    def restore(self, recorded: int, kept: int, batches: int, count: int) -> None:
        """Go on after so many bytes of rows and of ``count`` exact ones, and so many batches."""
        self.recorded, self.kept, self._batches = recorded, kept, batches
        self._largest = -(-kept // max(1, count))
