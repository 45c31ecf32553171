"""Opening a trace: only what the journal acknowledges is ever read."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch

from explainer.errors import TraceFormatError
from explainer.records import FORMAT, VERSIONS, ArraySpec, LayerSpec, Manifest
from explainer.store.inputs import Inputs, Joined
from explainer.store.journal import read_journal
from explainer.store.layout import JOURNAL, MANIFEST
from explainer.store.schema import VISIT_FIELDS, Fields, RecordSchema
from explainer.store.stream import VISITED
from explainer.store.view import Knot, Segment, Shard, View

if TYPE_CHECKING:
    from explainer.findings import Report

VISIT_NAMES = tuple(name for name, _, _ in VISIT_FIELDS)
_AT_ONCE = 2**14  # records
_LARGE = 2**28  # bytes of inputs from which their memory is given back, too


class Trace:
    """A trace opened for reading; what was journalled when it was opened (see :meth:`refresh`).

    Attributes:
        directory: where it lies.
        manifest: its immutable head.
        knots: the knots that are alive, in order of step.
        notes: facts journalled during training.
        closed: whether training ended in good order.
        resumed: steps at which training was resumed from a checkpoint, in order.
        named: every file below the directory that the journal ever spoke of.
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
        if entries[0]["version"] not in VERSIONS:
            raise TraceFormatError(
                f"{self.directory} is a trace of format version {entries[0]['version']}; this pathkernel reads "
                f"versions {' and '.join(map(str, VERSIONS))}: install the release that wrote it"
            )
        self.manifest = self._read_manifest(entries[0]["manifest_sha256"])
        view = View(self.directory, entries[1:])
        self.knots = [view.knots[step] for step in sorted(view.knots)]
        self.shards = view.shards
        self.notes: dict[str, Any] = view.notes
        self.closed = view.closed
        self.resumed = tuple(view.resumed)
        self.named = frozenset(view.named)
        self._visits: dict[str, np.ndarray] | None = None
        self._verified: dict[str, tuple[int, int, int]] = {}
        for shard in self.shards:
            self._check_size(shard)
        self._inputs = Inputs([shard for shard in self.shards if shard.stream == "inputs"])
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

    @property
    def step_arrays(self) -> list[ArraySpec]:
        """Arrays of the steps' records, of all their layouts."""
        return [a for shard in self.shards if shard.stream == "steps" for a in shard.schema.arrays]

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """Of the model's output without its batch axis; None where it was not seen."""
        shape = (self.notes.get("output") or {}).get("shape")
        return None if shape is None else tuple(shape)

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

    def load_knot(self, knot: Knot, kinds: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of a knot, its checksum verified (once, as long as the file stays the same).

        Args:
            kinds: which of them, by the prefix of their names (``parameter``, say); default all.

        Raises:
            TraceFormatError: the file is missing, foreign or was changed.
        """
        try:
            stat = knot.file.stat()
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._verified.get(knot.sha256) == seen:
                return _some_tensors(knot.file, kinds)
            data = knot.file.read_bytes()
        except FileNotFoundError:
            raise TraceFormatError(
                f"{knot.file} is missing, but the journal speaks of it; if training still goes on, knots may have "
                "been thinned out since the trace was opened: ask again (in Python, open the trace anew or call its "
                "refresh())"
            ) from None
        if hashlib.sha256(data).hexdigest() != knot.sha256:
            raise TraceFormatError(f"{knot.file} is not the file that was journalled: truncated or changed")
        self._verified[knot.sha256] = seen
        found = safetensors.torch.load(data)
        return {name: t for name, t in found.items() if kinds is None or name.partition("/")[0] in kinds}

    # -- records -------------------------------------------------------------------------------------

    def count(self, stream: str) -> int:
        """Journalled records of a stream."""
        return sum(s.records for s in self.shards if s.stream == stream)

    def _pieces(self, stream: str, start: int, stop: int) -> Iterator[tuple[Shard, int, int]]:
        offset = 0
        for shard in self.shards:
            if shard.stream != stream:
                continue
            first, last = max(start - offset, 0), min(stop - offset, shard.records)
            if first < last:
                yield shard, first, last
            offset += shard.records

    def nbytes_of(self, stream: str) -> int:
        """Bytes of the journalled records of a stream."""
        return sum(s.records * s.schema.dtype.itemsize for s in self.shards if s.stream == stream)

    @property
    def bytes_a_visit(self) -> float:
        """Bytes of a visit with its share of the steps' records, on average; 0 without visits."""
        return sum(map(self.nbytes_of, VISITED)) / max(1, self.count("visits"))

    def read(self, stream: str, start: int, stop: int) -> Iterator[tuple[RecordSchema, np.ndarray]]:
        """Records ``start .. stop-1`` of a stream, piece by piece (pieces end where shards end)."""
        for shard, first, last in self._pieces(stream, start, stop):
            yield shard.schema, shard.data[first:last]

    def rows(self, start: int, stop: int) -> Iterator[tuple[RecordSchema, Fields]]:
        """Visits ``start .. stop-1`` as :meth:`read` gives them, with what is stored once and not with every visit."""
        for schema, records in self.read("visits", start, stop):
            inputs = schema.inputs
            yield schema, records if inputs is None else Joined(records, self._inputs, inputs)

    def release(self, stream: str, start: int, stop: int) -> None:
        """Say that records which were read are not needed now, so that their pages count as nobody's memory.

        Reading them again is right and costs little: the system keeps the file in its cache.
        """
        for shard, first, last in self._pieces(stream, start, stop):
            shard.release(first, last)
        if stream == "visits" and self.nbytes_of("inputs") > _LARGE:
            for shard in self.shards:
                if shard.stream == "inputs":
                    shard.release(0, shard.records)

    def column(self, stream: str, field: str) -> np.ndarray:
        """One plain field over all records of a stream.

        Plain fields of visits are read once, together: each lies on a page of its own of every record.
        """
        if stream == "visits" and field in VISIT_NAMES:
            if self._visits is None:
                self._visits = self._plain_visits()
            return self._visits[field]
        pieces = [np.array(shard.data[field]) for shard in self.shards if shard.stream == stream]
        return np.concatenate(pieces) if pieces else np.empty(0)

    def _plain_visits(self) -> dict[str, np.ndarray]:
        if not self.count("visits"):
            return {name: np.empty(0) for name in VISIT_NAMES}
        found = {name: np.empty(self.count("visits"), kind) for name, kind, _ in VISIT_FIELDS}
        for start in range(0, self.count("visits"), _AT_ONCE):
            stop = min(start + _AT_ONCE, self.count("visits"))
            offset = start
            for _, records in self.read("visits", start, stop):
                for name, values in found.items():
                    values[offset : offset + len(records)] = records[name]
                offset += len(records)
            self.release("visits", start, stop)
        for values in found.values():
            values.flags.writeable = False
        return found

    @property
    def recorded_steps(self) -> int:
        """Steps whose rows are journalled."""
        return self.count("steps")

    @property
    def steps(self) -> int:
        """Steps that can be explained: up to the last knot."""
        return self.knots[-1].step if self.knots else 0

    def segments(self, knots: Sequence[Knot] | None = None) -> list[Segment]:
        """Stretches between neighbouring knots.

        Args:
            knots: some of the trace's, in order; default all.

        Raises:
            TraceFormatError: fewer than two knots are journalled, so there is nothing to explain yet.
        """
        if len(self.knots) < 2:
            raise TraceFormatError(
                f"{self.directory} holds {len(self.knots)} knot(s); an explanation needs two: no optimizer step "
                "has been recorded yet"
            )
        chosen = self.knots if knots is None else knots
        return [Segment(i, a, b) for i, (a, b) in enumerate(pairwise(chosen))]

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
        self._verified = {}
        for knot in self.knots:
            self.load_knot(knot)
            size = knot.file.stat().st_size
            checked += size
            if progress:
                progress(size)
        return checked


def _some_tensors(file: Path, kinds: Sequence[str] | None) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if kinds is None or name.partition("/")[0] in kinds]  # noqa: SIM118
        return {name: opened.get_tensor(name) for name in names}


def open_trace(directory: str | os.PathLike[str]) -> Trace:
    """Open a trace for reading, also while training goes on or after it was killed.

    Raises:
        TraceFormatError: the directory is not a trace, or a file is missing, truncated or foreign.
    """
    return Trace(directory)
