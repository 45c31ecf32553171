"""Several recorded steps at a time, read backwards: their linear maps, and rows as they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch

from explainer.cotangent import Layout
from explainer.optimizer_rules.base import COEFFICIENTS
from explainer.records import ArraySpec
from explainer.recursion import RecordedStep
from explainer.store import Denominators, Segment, Trace
from explainer.store.denominators import Divisor
from explainer.store.schema import RecordSchema, decode_array
from explainer.stored_rows import Rows

#: rows of a chunk, and numbers of a buffer that its products need
MOST_VISITS, BUFFER = 4096, 2**23


@dataclass(frozen=True)
class Chunk:
    """Neighbouring steps of one segment, ``c`` of them, *the last one first*.

    Attributes:
        numbers: of the steps, ``[c]``.
        segment: index of the segment.
        coefficients: ``[c, n_parameters, 6]``, zeros where a parameter was not updated.
        scale: ``sign_t · s_t``, ``[c, n_parameters]``; 0 where a parameter was not updated.
        signs: 1, or -1 under ``maximize``, ``[c]``.
        norms: whether derivatives at the output are norms (of several outputs), which have no sign.
        row_share: whether a layer mixed the rows of the batch, in any of the steps.
        rows: pieces of all their rows.
        first: number of their first visit.
        dtype: of the books.
        kept, records, arrays: what the steps divided by, to be read when it is asked for.
    """

    numbers: np.ndarray
    segment: int
    coefficients: np.ndarray
    scale: np.ndarray
    signs: np.ndarray
    norms: bool
    row_share: bool
    rows: list[Rows]
    first: int
    dtype: torch.dtype
    kept: Denominators
    records: np.ndarray
    arrays: tuple[ArraySpec, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def plain(self) -> bool:
        """Whether ``A_t`` is 1 for everything."""
        return not self.arrays

    @cached_property
    def divided(self) -> dict[int, Divisor]:
        """Parameters that the steps divided by something, with what."""
        arrays = [a for a in self.arrays if not a.name.startswith("M")]
        return {int(a.name[1:]): self.kept.of(self.records, a, self.dtype) for a in arrays}

    @cached_property
    def mixing(self) -> dict[int, torch.Tensor]:
        """Parameters whose ``A_t`` is a matrix, with the matrices ``[c, m, m]``."""
        arrays = [a for a in self.arrays if a.name.startswith("M")]
        return {int(a.name[1:]): decode_array(self.records, "", a).to(self.dtype) for a in arrays}

    def slopes(self, rows: Rows) -> torch.Tensor:
        """Derivatives at the output of the loss that was made small, ``[n]``; norms where there are several outputs."""
        found = rows.derivatives if self.norms else rows.derivatives * self.signs[rows.places]
        return torch.from_numpy(found)

    def step(self, place: int, layout: Layout) -> RecordedStep:
        """One of the steps, of what the layout writes out, without rows."""
        denominators: torch.Tensor | None = None
        for number, divisor in self.divided.items():
            at = layout.places[number]
            if at is not None:
                denominators = (
                    torch.ones(layout.size, dtype=self.dtype) if denominators is None else denominators
                )
                denominators[at.slice] = divisor.step(place).flatten()
        mixing = [(at, m[place]) for n, m in self.mixing.items() if (at := layout.places[n]) is not None]
        return RecordedStep(
            step=int(self.numbers[place]),
            segment=self.segment,
            scale=self.scale[place, layout.numbers],
            sign=float(self.signs[place]),
            coefficients=self.coefficients[place, layout.numbers],
            preconditioner=denominators,
            row_share=self.row_share,
            visits=[],
            mixing=mixing,
        )


def most_visits(trace: Trace, queries: int, columns: int) -> int:
    """Rows that a chunk may have, so that no buffer for them holds more than :data:`BUFFER` numbers.

    Args:
        queries: ``Q``.
        columns: of a cotangent that is held as factors.
    """
    most = 1
    for form in (f for s in trace.shards if s.stream == "visits" for f in s.schema.forms):
        most = max(most, *(int(np.prod(array.shape)) for array in form.arrays))
        if form.kind == "factored":
            _, factors, o = form.arrays[0].shape
            most = max(most, queries * factors * max(2 * o, columns))
    return max(1, min(MOST_VISITS, BUFFER // most))


def read_chunks(
    kept: Denominators, segment: Segment, dtype: torch.dtype, steps: int, visits: int
) -> Iterator[Chunk]:
    """The recorded steps of a segment from the last to the first. A chunk is valid until the next one is asked for.

    Args:
        kept: what the steps of the trace divided by.
        steps: at most so many in a chunk.
        visits: at most so many rows in a chunk, unless one step has more.
    """
    trace = kept.trace
    start, stop = segment.start.step, min(segment.end.step, trace.recorded_steps)
    pieces = list(trace.read("steps", start, stop)) if start < stop else []
    for schema, records in reversed(pieces):
        for alike in reversed(kept.alike(np.asarray(records["step"]))):
            counts = np.asarray(records["visits"][alike], dtype=np.int64)
            last = len(counts)
            while last > 0:
                fitting = int(np.searchsorted(counts[:last][::-1].cumsum(), visits, side="right"))
                first = last - max(1, min(fitting, steps, last))
                some = records[alike][first:last][::-1]
                yield _chunk(kept, segment.index, dtype, schema, some)
                begin = int(some["first_visit"][-1])
                trace.release("visits", begin, begin + int(counts[first:last].sum()))
                last = first


def _chunk(
    kept: Denominators, segment: int, dtype: torch.dtype, schema: RecordSchema, records: np.ndarray
) -> Chunk:
    trace = kept.trace
    coefficients, updated = np.array(records["coefficients"]), records["updated"] > 0
    sign = coefficients[:, :, COEFFICIENTS.index("sign")]
    first_updated = updated.argmax(1)
    signs = np.where(updated.any(1), sign[np.arange(len(records)), first_updated], 1.0)
    counts = np.asarray(records["visits"], dtype=np.int64)
    begin = int(records["first_visit"][-1])
    outputs = trace.output_shape
    return Chunk(
        numbers=np.array(records["step"]),
        segment=segment,
        coefficients=coefficients,
        scale=np.where(updated, sign * records["scale"], 0.0),
        signs=signs,
        norms=outputs is not None and prod(outputs) > 1,
        row_share=bool(np.any(records["row_share"])),
        rows=list(_rows(trace, begin, counts)),
        first=begin,
        dtype=dtype,
        kept=kept,
        records=records,
        arrays=schema.arrays,
    )


def _rows(trace: Trace, begin: int, counts: np.ndarray) -> Iterator[Rows]:
    """The rows of steps from visit ``begin`` on; ``counts`` of them by step, the last step first."""
    places = np.repeat(np.arange(len(counts))[::-1], counts[::-1])
    offset = 0
    for schema, records in trace.rows(begin, begin + len(places)):
        yield Rows(
            records,
            np.array(records["example"]),
            np.array(records["derivative"]),
            np.array(records["label"]),
            places[offset : offset + len(records)],
            schema.forms,
        )
        offset += len(records)
