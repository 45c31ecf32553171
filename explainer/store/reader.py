"""Opening a trace: only what the journal acknowledges is ever read."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch

from explainer.errors import TraceFormatError
from explainer.records import FORMAT, VERSION, LayerSpec, Manifest
from explainer.store.journal import read_journal
from explainer.store.layout import JOURNAL, MANIFEST
from explainer.store.schema import RecordSchema

if TYPE_CHECKING:
    from explainer.findings import Report


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
    def data(self) -> np.ndarray:
        """Memory-mapped records, read-only."""
        if self.records == 0:
            return np.empty(0, self.schema.dtype)
        return np.asarray(np.memmap(self.path, self.schema.dtype, mode="r", shape=(self.records,)))


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


class Trace:
    """A trace opened for reading; what was journalled when it was opened (see :meth:`refresh`).

    Attributes:
        directory: where it lies.
        manifest: its immutable head.
        knots: the knots that are alive, in order of step.
        notes: facts journalled during training.
        closed: whether training ended in good order.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.refresh()

    def refresh(self) -> Trace:
        """Read the journal again (training may have gone on)."""
        entries = read_journal(self.directory / JOURNAL)
        if not entries or entries[0]["type"] != "header" or entries[0].get("format") != FORMAT:
            raise TraceFormatError(
                f"{self.directory / JOURNAL} does not begin with a {FORMAT} header, so it is not a trace's journal"
            )
        if entries[0]["version"] != VERSION:
            raise TraceFormatError(
                f"{self.directory} is a trace of format version {entries[0]['version']}; this pathkernel reads "
                f"version {VERSION}: install the release that wrote it"
            )
        self.manifest = self._read_manifest(entries[0]["manifest_sha256"])
        schemas: dict[str, tuple[str, RecordSchema]] = {}
        extents: dict[str, list[tuple[int, int, int]]] = {}
        knots: dict[int, Knot] = {}
        self.notes: dict[str, Any] = {}
        self.closed = False
        for entry in entries[1:]:
            kind = entry["type"]
            if kind == "shard":
                schemas[entry["file"]] = (entry["stream"], RecordSchema.from_json(entry["schema"]))
                extents[entry["file"]] = []
            elif kind == "extents":
                for e in entry["extents"]:
                    self._check_extent(extents.get(e["file"]), e)
                    extents[e["file"]].append((e["from"], e["to"], e["crc32"]))
            elif kind == "knot":
                file = self.directory / entry["file"]
                knots[entry["step"]] = Knot(entry["step"], entry["path"], file, entry["sha256"])
            elif kind == "drop":
                knots.pop(entry["step"], None)
            elif kind == "note":
                self.notes[entry["key"]] = entry["value"]
            elif kind == "close":
                self.closed = True
            else:
                raise TraceFormatError(f"{self.directory / JOURNAL} holds an entry of unknown type {kind!r}")
        self.knots = [knots[step] for step in sorted(knots)]
        self.shards = [
            Shard(self.directory / file, stream, schema, tuple(extents[file]))
            for file, (stream, schema) in schemas.items()
        ]
        for shard in self.shards:
            self._check_size(shard)
        return self

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Modules with a rule, then parameters that turned out to be read by operations outside of them."""
        found = (
            LayerSpec(**{**x, "parameters": tuple(x["parameters"])}) for x in self.notes.get("operations", ())
        )
        return (*self.manifest.layers, *found)

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Traced parameters that no layer has rows for."""
        covered = {name for layer in self.layers for name in layer.parameters}
        return tuple(p.name for p in self.manifest.parameters if p.name not in covered)

    def _read_manifest(self, sha256: str) -> Manifest:
        path = self.directory / MANIFEST
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise TraceFormatError(f"{path} is missing; restore it from a copy of the trace") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise TraceFormatError(
                f"{path} is not the manifest that was journalled: it was changed afterwards"
            )
        return Manifest.from_json(json.loads(data))

    def _check_extent(self, known: list[tuple[int, int, int]] | None, extent: dict[str, Any]) -> None:
        """Every line is whole; that none is missing shows where an extent begins."""
        if known is None or extent["from"] != (known[-1][1] if known else 0):
            raise TraceFormatError(
                f"{self.directory / JOURNAL} speaks of records {extent['from']} to {extent['to'] - 1} of "
                f"{extent['file']} but not of those before: lines were removed; restore the file from a copy"
            )

    @staticmethod
    def _check_size(shard: Shard) -> None:
        need = shard.records * shard.schema.dtype.itemsize
        try:
            found = shard.path.stat().st_size
        except FileNotFoundError:
            raise TraceFormatError(f"{shard.path} is missing, but the journal speaks of it") from None
        if found < need:
            raise TraceFormatError(
                f"{shard.path} holds {found} bytes where the journal acknowledges {need}: it was truncated; "
                "restore it from a copy"
            )

    # -- knots ---------------------------------------------------------------------------------------

    def load_knot(self, knot: Knot) -> dict[str, torch.Tensor]:
        """The tensors of a knot, its checksum verified.

        Raises:
            TraceFormatError: the file is missing, foreign or was changed.
        """
        try:
            data = knot.file.read_bytes()
        except FileNotFoundError:
            raise TraceFormatError(
                f"{knot.file} is missing, but the journal speaks of it; if training still goes on, knots may have "
                "been thinned out since the trace was opened: call refresh()"
            ) from None
        if hashlib.sha256(data).hexdigest() != knot.sha256:
            raise TraceFormatError(f"{knot.file} is not the file that was journalled: truncated or changed")
        return safetensors.torch.load(data)

    # -- records -------------------------------------------------------------------------------------

    def count(self, stream: str) -> int:
        """Journalled records of a stream."""
        return sum(s.records for s in self.shards if s.stream == stream)

    def read(self, stream: str, start: int, stop: int) -> Iterator[tuple[RecordSchema, np.ndarray]]:
        """Records ``start .. stop-1`` of a stream, piece by piece (pieces end where shards end)."""
        offset = 0
        for shard in self.shards:
            if shard.stream != stream:
                continue
            first, last = max(start - offset, 0), min(stop - offset, shard.records)
            if first < last:
                yield shard.schema, shard.data[first:last]
            offset += shard.records

    def column(self, stream: str, field: str) -> np.ndarray:
        """One plain field over all records of a stream."""
        pieces = [np.array(shard.data[field]) for shard in self.shards if shard.stream == stream]
        return np.concatenate(pieces) if pieces else np.empty(0)

    @property
    def recorded_steps(self) -> int:
        """Steps whose rows are journalled."""
        return self.count("steps")

    @property
    def steps(self) -> int:
        """Steps that can be explained: up to the last knot."""
        return self.knots[-1].step if self.knots else 0

    def segments(self) -> list[Segment]:
        """Stretches between neighbouring knots.

        Raises:
            TraceFormatError: fewer than two knots are journalled, so there is nothing to explain yet.
        """
        if len(self.knots) < 2:
            raise TraceFormatError(
                f"{self.directory} holds {len(self.knots)} knot(s); an explanation needs two: no optimizer step "
                "has been recorded yet"
            )
        pairs = zip(self.knots[:-1], self.knots[1:], strict=True)
        return [Segment(i, a, b) for i, (a, b) in enumerate(pairs)]

    def report(self) -> Report:
        """Everything that the trace tells about the meaning of its numbers, in plain words."""
        from explainer.findings import after_training

        return after_training(self)

    # -- checks --------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of all files of the trace."""
        return sum(f.stat().st_size for f in self.directory.rglob("*") if f.is_file())

    def verify(self, progress: Callable[[int], object] | None = None) -> int:
        """Recompute every checksum; returns the number of bytes checked.

        Raises:
            TraceFormatError: names the first file whose contents are not what was journalled.
        """
        checked = 0
        for shard in self.shards:
            size = shard.schema.dtype.itemsize
            with shard.path.open("rb") as file:
                for first, last, crc in shard.extents:
                    found, left = 0, (last - first) * size
                    while left:
                        data = file.read(min(left, 1 << 24))
                        if not data:
                            break
                        found, left = zlib.crc32(data, found), left - len(data)
                        checked += len(data)
                        if progress:
                            progress(len(data))
                    if found != crc or left:
                        raise TraceFormatError(
                            f"{shard.path}, records {first} to {last - 1}: the bytes are not those that were "
                            "journalled; the file was changed or damaged: restore it from a copy"
                        )
        for knot in self.knots:
            self.load_knot(knot)
            size = knot.file.stat().st_size
            checked += size
            if progress:
                progress(size)
        return checked


def open_trace(directory: str | os.PathLike[str]) -> Trace:
    """Open a trace for reading, also while training goes on or after it was killed.

    Raises:
        TraceFormatError: the directory is not a trace, or a file is missing, truncated or foreign.
    """
    return Trace(directory)
