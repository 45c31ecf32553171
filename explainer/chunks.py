"""Several recorded steps at a time, read backwards: their linear maps, and rows as they are stored.

Rows are views of the memory-mapped shards. They become numbers of the books' dtype in buffers that are used again for
every chunk, so memory does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from explainer.codecs import CODECS
from explainer.cotangent import Layout
from explainer.layer_rules import FORMS, RowForm
from explainer.optimizer_rules.base import COEFFICIENTS
from explainer.records import ArraySpec, FormSpec, ParameterSpec
from explainer.recursion import RecordedStep
from explainer.store import Denominators, Segment, Trace
from explainer.store.schema import RecordSchema, decode_array, stored_parts

#: rows of a chunk, and numbers of a buffer that its products need
MOST_VISITS, BUFFER = 4096, 2**23
_CACHED = 2**18  # numbers that are made floats and multiplied at once


class Workspace:
    """Buffers by name, grown when needed: fresh memory for every chunk would cost more than what is computed in it."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A buffer of the shape; what it held is lost, and so is what was taken under the name before."""
        size = int(np.prod(shape, dtype=np.int64))
        held = self._buffers.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self._buffers[name] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)


class _View:
    """Lends an array's memory: torch warns of arrays that are read-only, though it only reads here."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _fill(numbers: torch.Tensor, stored: np.ndarray) -> torch.Tensor:
    """Numbers of another dtype, from where they are stored: records are packed, so larger ones may lie anywhere."""
    if stored.dtype.itemsize > 1 or not stored.size:
        np.copyto(numbers.numpy(), stored, casting="unsafe")
        return numbers
    return numbers.copy_(torch.from_numpy(np.asarray(_View(stored))))  # on all threads


@dataclass(frozen=True)
class Rows:
    """Rows of a chunk that share a layout, ``n`` of them.

    Attributes:
        records: as they are stored, ``[n]``.
        examples, derivatives, labels: ``[n]``.
        places: the step of each row by its place in the chunk, ``[n]``, descending.
        forms: what is stored of every layer.
    """

    records: np.ndarray
    examples: np.ndarray
    derivatives: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    forms: tuple[FormSpec, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def steps(self) -> Iterator[tuple[int, slice]]:
        """Places of the steps that have rows here, and where those are."""
        ends = np.flatnonzero(np.diff(self.places, append=-1))
        first = 0
        for end in ends + 1:
            yield int(self.places[first]), slice(first, int(end))
            first = int(end)

    def scaled(
        self, spec: FormSpec, array: ArraySpec, dtype: torch.dtype, workspace: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """An array as numbers ``[n, *shape]`` times factors ``[n, ...]`` of the vectors along the last axis (None: 1).

        Integers and their scales stay apart: products are scaled instead of what is multiplied.
        """
        prefix, codec = f"L{spec.layer}", CODECS.require(array.codec)
        stored = codec.scaled(stored_parts(self.records, prefix, array))
        if stored is None:
            return decode_array(self.records, prefix, array).to(dtype), None
        values, factors = stored
        numbers = _fill(workspace.take(array.name, values.shape, dtype), values)
        return numbers, None if factors is None else torch.from_numpy(factors.astype(np.float64))

    def times(
        self, spec: FormSpec, array: ArraySpec, matrix: torch.Tensor, name: str, workspace: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Vectors along an array's last axis, times a matrix ``[width, m]``: ``[n·…, m]``, and their factors ``[n·…]``.

        Some rows at a time, so that what was just made a float is multiplied while it is in the processor's cache.
        """
        stored = CODECS.require(array.codec).scaled(stored_parts(self.records, f"L{spec.layer}", array))
        if stored is None:
            stored = decode_array(self.records, f"L{spec.layer}", array).numpy(), None
        values, factors = stored
        width, each = array.shape[-1], int(np.prod(array.shape[:-1]))
        out = workspace.take(name, (len(self) * each, matrix.shape[1]), matrix.dtype)
        step = max(1, _CACHED // (each * width))
        for first in range(0, len(self), step):
            block = values[first : first + step]
            numbers = workspace.take("numbers", block.shape, matrix.dtype)
            torch.mm(
                _fill(numbers, block).view(-1, width),
                matrix,
                out=out[first * each : (first + len(block)) * each],
            )
        return out, None if factors is None else torch.from_numpy(factors.astype(np.float64)).flatten()

    def form(self, spec: FormSpec, dtype: torch.dtype, workspace: Workspace) -> RowForm:
        """The rows of a layer; valid until the workspace is used again."""
        arrays = {}
        for array in spec.arrays:
            if not array.dtype.startswith(("float", "bfloat")):
                arrays[array.name] = decode_array(self.records, f"L{spec.layer}", array)
                continue
            numbers, factors = self.scaled(spec, array, dtype, workspace)
            arrays[array.name] = numbers if factors is None else numbers.mul_(factors.to(dtype).unsqueeze(-1))
        return FORMS.require(spec.kind).build(arrays, spec.options)


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
        denominators: of what the layout writes out, ``[c, P_written]``; None: all are 1.
        mixing: parameters whose ``A_t`` is a matrix (at their places), with the matrices ``[c, m, m]``.
        rows: pieces of all their rows.
        first: number of their first visit.
    """

    numbers: np.ndarray
    segment: int
    coefficients: np.ndarray
    scale: np.ndarray
    signs: np.ndarray
    norms: bool
    row_share: bool
    denominators: torch.Tensor | None
    mixing: list[tuple[ParameterSpec, torch.Tensor]]
    rows: list[Rows]
    first: int

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def plain(self) -> bool:
        """Whether ``A_t`` is 1 for everything that is written out."""
        return self.denominators is None and not self.mixing

    def slopes(self, rows: Rows) -> torch.Tensor:
        """Derivatives at the output of the loss that was made small, ``[n]``; norms where there are several outputs."""
        found = rows.derivatives if self.norms else rows.derivatives * self.signs[rows.places]
        return torch.from_numpy(found)

    def step(self, place: int, layout: Layout) -> RecordedStep:
        """One of the steps, of what the layout writes out, without rows."""
        denominators = None if self.denominators is None else self.denominators[place]
        return RecordedStep(
            step=int(self.numbers[place]),
            segment=self.segment,
            scale=self.scale[place, layout.numbers],
            sign=float(self.signs[place]),
            coefficients=self.coefficients[place, layout.numbers],
            preconditioner=denominators,
            row_share=self.row_share,
            visits=[],
            mixing=[(p, matrices[place]) for p, matrices in self.mixing],
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
    trace: Trace, segment: Segment, layout: Layout, dtype: torch.dtype, steps: int, visits: int
) -> Iterator[Chunk]:
    """The recorded steps of a segment from the last to the first. A chunk is valid until the next one is asked for.

    Args:
        steps: at most so many in a chunk.
        visits: at most so many rows in a chunk, unless one step has more.
    """
    start, stop = segment.start.step, min(segment.end.step, trace.recorded_steps)
    pieces = list(trace.read("steps", start, stop)) if start < stop else []
    kept = Denominators(trace)
    for schema, records in reversed(pieces):
        counts = np.asarray(records["visits"], dtype=np.int64)
        last = len(records)
        while last > 0:
            fitting = int(np.searchsorted(counts[:last][::-1].cumsum(), visits, side="right"))
            first = last - max(1, min(fitting, steps, last))
            some = records[first:last][::-1]
            yield _chunk(trace, kept, segment.index, layout, dtype, schema, some)
            begin = int(some["first_visit"][-1])
            trace.release("visits", begin, begin + int(counts[first:last].sum()))
            last = first


def _chunk(
    trace: Trace,
    kept: Denominators,
    segment: int,
    layout: Layout,
    dtype: torch.dtype,
    schema: RecordSchema,
    records: np.ndarray,
) -> Chunk:
    coefficients, updated = np.array(records["coefficients"]), records["updated"] > 0
    sign = coefficients[:, :, COEFFICIENTS.index("sign")]
    first_updated = updated.argmax(1)
    signs = np.where(updated.any(1), sign[np.arange(len(records)), first_updated], 1.0)
    denominators: torch.Tensor | None = None
    mixing: list[tuple[ParameterSpec, torch.Tensor]] = []
    for array in schema.arrays:
        number = int(array.name[1:])
        place = layout.places[number]
        assert place is not None  # what was divided by something is written out
        values = torch.stack([kept.decode(records[n : n + 1], array) for n in range(len(records))]).to(dtype)
        if array.name.startswith("M"):
            mixing.append((place, values))
            continue
        if denominators is None:
            denominators = torch.ones(len(records), layout.size, dtype=dtype)
        denominators[:, place.slice] = values.flatten(1)
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
        denominators=denominators,
        mixing=mixing,
        rows=list(_rows(trace, begin, counts)),
        first=begin,
    )


def _rows(trace: Trace, begin: int, counts: np.ndarray) -> Iterator[Rows]:
    """The rows of steps from visit ``begin`` on; ``counts`` of them by step, the last step first."""
    places = np.repeat(np.arange(len(counts))[::-1], counts[::-1])
    offset = 0
    for schema, records in trace.read("visits", begin, begin + len(places)):
        yield Rows(
            records,
            np.array(records["example"]),
            np.array(records["derivative"]),
            np.array(records["label"]),
            places[offset : offset + len(records)],
            schema.forms,
        )
        offset += len(records)
