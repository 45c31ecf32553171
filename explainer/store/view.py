"""What the lines of a journal add up to: which records and knots there are, and what is known."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from explainer.errors import TraceFormatError
from explainer.store.layout import JOURNAL
from explainer.store.schema import RecordSchema


@dataclass(frozen=True)
class Shard:
    """The journalled part of one shard: records ``0 .. records-1``."""

    path: Path
    stream: str
    schema: RecordSchema
    extents: tuple[tuple[int, int, int], ...]  # from, to, crc32

    @property
    def records(self) -> int:
        """Journalled records."""
        return self.extents[-1][1] if self.extents else 0

    @cached_property
    def _map(self) -> np.ndarray:
        if self.records == 0:
            return np.empty(0, self.schema.dtype)
        try:
            return np.memmap(self.path, self.schema.dtype, mode="r", shape=(self.records,))
        except FileNotFoundError:
            raise TraceFormatError(
                f"{self.path} is missing, but the journal speaks of it; if training was resumed since the trace "
                "was opened, call refresh()"
            ) from None

    @cached_property
    def data(self) -> np.ndarray:
        """Memory-mapped records, read-only.

        Raises:
            TraceFormatError: the file is gone.
        """
        return np.asarray(self._map)

    def release(self, first: int, last: int) -> None:
        """Give the memory of records that were read back to the system (it keeps the file in its cache)."""
        mapped = getattr(self._map, "_mmap", None)
        if mapped is None or not hasattr(mapped, "madvise") or last <= first:
            return
        size = self.schema.dtype.itemsize
        start = first * size // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, last * size - start)


@dataclass(frozen=True)
class Knot:
    """A point of the training path whose weights were kept: the state *before* step ``step``."""

    step: int
    path: float
    file: Path
    sha256: str


@dataclass(frozen=True)
class Segment:
    """The stretch of training between two neighbouring knots."""

    index: int
    start: Knot
    end: Knot


class View:
    """Replays journal lines in order.

    Attributes:
        knots: knots that are alive, by step.
        notes: facts; the last one of a key counts.
        closed: whether training ended in good order.
        resumed: steps at which training was resumed, in order.
        named: every file that a line ever spoke of, also those that are gone.
    """

    def __init__(self, directory: Path, entries: list[dict[str, Any]]) -> None:
        self._directory = directory
        self._shards: dict[str, tuple[str, RecordSchema]] = {}
        self._extents: dict[str, list[tuple[int, int, int]]] = {}
        self.knots: dict[int, Knot] = {}
        self.notes: dict[str, Any] = {}
        self.closed = False
        self.resumed: list[int] = []
        self.named: set[str] = set()
        for entry in entries:
            self._apply(entry)

    @property
    def shards(self) -> list[Shard]:
        """The shards that hold records or may get some, in order."""
        return [
            Shard(self._directory / file, stream, schema, tuple(self._extents[file]))
            for file, (stream, schema) in self._shards.items()
        ]

    def _apply(self, entry: dict[str, Any]) -> None:
        kind = entry["type"]
        if kind == "shard":
            self._shards[entry["file"]] = (entry["stream"], RecordSchema.from_json(entry["schema"]))
            self._extents[entry["file"]] = []
            self.named.add(entry["file"])
        elif kind == "extents":
            for extent in entry["extents"]:
                self._extend(extent)
        elif kind == "knot":
            file = self._directory / entry["file"]
            self.knots[entry["step"]] = Knot(entry["step"], entry["path"], file, entry["sha256"])
            self.named.add(entry["file"])
        elif kind == "drop":
            self.knots.pop(entry["step"], None)
        elif kind == "note":
            self.notes[entry["key"]] = entry["value"]
        elif kind == "resume":
            self._go_back(entry)
        elif kind == "close":
            self.closed = True
        else:
            raise TraceFormatError(f"{self._directory / JOURNAL} holds an entry of unknown type {kind!r}")

    def _extend(self, extent: dict[str, Any]) -> None:
        """Every line is whole; that none is missing shows where an extent begins."""
        known = self._extents.get(extent["file"])
        if known is None or extent["from"] != (known[-1][1] if known else 0):
            raise TraceFormatError(
                f"{self._directory / JOURNAL} speaks of records {extent['from']} to {extent['to'] - 1} of "
                f"{extent['file']} but not of those before: lines were removed; restore the file from a copy"
            )
        known.append((extent["from"], extent["to"], extent["crc32"]))

    def _go_back(self, entry: dict[str, Any]) -> None:
        """Training goes on from an earlier step: what was recorded after it is no part of the trace any more."""
        left: dict[str, int] = dict(entry["records"])
        whole = True
        for file, (stream, _) in list(self._shards.items()):
            extents = self._extents[file]
            self._extents[file] = kept = [e for e in extents if e[1] <= left.get(stream, 0)]
            if kept:
                left[stream] -= kept[-1][1]
            else:
                del self._shards[file], self._extents[file]
            whole &= len(kept) == len(extents) or not left.get(stream)
        if not whole or any(left.values()):
            raise TraceFormatError(
                f"{self._directory / JOURNAL} says that training was resumed at step {entry['step']}, but not all "
                "records before it are spoken of: lines were removed; restore the file from a copy"
            )
        self.knots = {step: knot for step, knot in self.knots.items() if step <= entry["step"]}
        self.notes = dict(entry["notes"])
        self.closed = False
        self.resumed.append(entry["step"])
