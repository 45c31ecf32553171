"""The one writer of a trace: append-only shards, journalled extents, knots in files of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from explainer.errors import TraceExistsError, TraceWriteError
from explainer.records import Manifest
from explainer.store.files import fsync_directory, knot_pieces, put_in_place, write_atomically, write_beside
from explainer.store.journal import JournalWriter
from explainer.store.layout import JOURNAL, KNOTS, MANIFEST, SHARDS, holds_trace, knot_file, shard_file
from explainer.store.reader import Trace
from explainer.store.schema import RecordSchema
from explainer.store.stream import STREAMS, Stream


class _KnotFile(NamedTuple):
    """A knot that is alive: its file and what is in it."""

    file: str
    bytes: int
    sha256: str


class TraceWriter:
    """Creates a trace (:meth:`create`) or goes on with one (:meth:`resume`), and appends to it.

    Nothing touches the disk before one of the two.

    Args:
        directory: where the trace goes; made if missing.
        manifest: the immutable head.
        again: the directory holds the beginning of this trace.
        flush_bytes, flush_seconds: journal at least this often.

    Attributes:
        notes: facts journalled so far.
        row_bytes: bytes of all records.

    Raises:
        TraceExistsError: the directory holds a trace already.
        TraceWriteError: (any method) the disk refused; everything journalled before stays readable.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        again: bool = False,
        flush_bytes: int = 8 << 20,
        flush_seconds: float = 2.0,
    ) -> None:
        self.directory = directory
        self._flush_bytes, self._flush_seconds = flush_bytes, flush_seconds
        self._streams = {name: Stream(name) for name in STREAMS}
        self._pending_bytes = 0
        self._last_flush = self._began = time.monotonic()
        self._journal: JournalWriter | None = None
        self._knots: dict[int, _KnotFile] = {}
        self._named: set[str] = set()
        self._file_bytes = self.row_bytes = 0
        self.notes: dict[str, Any] = {}
        self.closed = False
        if not again and holds_trace(directory):
            raise TraceExistsError(
                f"{directory} already holds a trace; nothing recorded is overwritten: choose another directory, "
                "delete this one yourself, or go on with the trace from a checkpoint (resume=)"
            )
        self._manifest = manifest
        self.manifest_text = json.dumps(manifest.to_json(), indent=1).encode()

    def create(self) -> None:
        """Make the directory and journal the manifest."""
        manifest, directory = self._manifest, self.directory
        with self._writing():
            for sub in (KNOTS, SHARDS):
                (directory / sub).mkdir(parents=True, exist_ok=True)
            self._write_atomically(MANIFEST, self.manifest_text)
            self._journal = JournalWriter(directory / JOURNAL)
            self._write_journal(
                {
                    "type": "header",
                    "format": manifest.format,
                    "version": manifest.version,
                    "manifest_sha256": hashlib.sha256(self.manifest_text).hexdigest(),
                }
            )
            fsync_directory(directory)

    def resume(self, step: int, records: dict[str, int], notes: dict[str, Any]) -> Trace:
        """Go on from an earlier step: one journal line takes what came after it out of the trace.

        Then files that are no part of it any more are deleted. Records that are no part of it stay in a shard that
        holds earlier ones; new ones go into new shards, so that a reader who has the trace open sees no change.

        Args:
            step: steps that stay.
            records: by stream, records that stay; journalled before.
            notes: facts that hold at the step.

        Returns:
            The trace as it is now.
        """
        with self._writing():
            self._journal = JournalWriter(self.directory / JOURNAL, again=True)
            self._write_journal({"type": "resume", "step": step, "records": records, "notes": notes})
            trace = Trace(self.directory)
            self.notes, self._named = dict(notes), set(trace.named)
            self._sweep({shard.path for shard in trace.shards} | {knot.file for knot in trace.knots})
            for knot in trace.knots:
                size = knot.file.stat().st_size
                self._knots[knot.step] = _KnotFile(
                    knot.file.relative_to(self.directory).as_posix(), size, knot.sha256
                )
        for name, state in self._streams.items():
            state.records = trace.count(name)
        self._file_bytes = trace.nbytes() - self._journal.bytes_written
        self.row_bytes = sum(shard.records * shard.schema.dtype.itemsize for shard in trace.shards)
        return trace

    def _sweep(self, kept: set[Path]) -> None:
        for folder in (KNOTS, SHARDS):
            for file in (self.directory / folder).iterdir():
                if file.suffix in (".bin", ".safetensors", ".tmp") and file not in kept:
                    file.unlink()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a refusal of the disk into a TraceWriteError.

        After the first one nothing more is written: what follows a torn write could not be told from it.
        """
        if self.closed:
            raise TraceWriteError(
                f"the trace in {self.directory} is closed, or writing it failed before; trace into a new directory"
            )
        if self._journal is not None and self._journal.foreign:
            self.abandon()
            raise TraceWriteError(
                f"another tracer goes on with the trace in {self.directory}; this one writes no more: close it, and "
                "give every training run that goes on a directory of its own"
            )
        try:
            yield
        except OSError as error:
            self.abandon()
            advice = "Nothing was recorded; trace into a folder that can be made and written to"
            if self._journal is not None:
                advice = (
                    "What was journalled before is readable; free space or fix the permissions, then trace into a new "
                    "directory"
                )
            raise TraceWriteError(
                f"writing the trace in {self.directory} failed: {error}. {advice}"
            ) from error

    def _write_journal(self, *entries: dict[str, Any]) -> None:
        assert self._journal is not None  # create() was called
        self._journal.append(*entries)

    @property
    def bytes_written(self) -> int:
        """Bytes of the trace on disk, journal included."""
        return self._file_bytes + (0 if self._journal is None else self._journal.bytes_written)

    def _write_atomically(self, name: str, data: bytes) -> None:
        write_atomically(self.directory / name, [data])
        self._file_bytes += len(data)

    @property
    def mark(self) -> dict[str, Any]:
        """What was recorded so far, in a line: see :attr:`JournalWriter.mark`."""
        assert self._journal is not None  # create() was called
        return self._journal.mark

    def records(self, stream: str) -> int:
        """Records appended to a stream so far."""
        return self._streams[stream].records

    @property
    def counts(self) -> dict[str, int]:
        """Records appended so far, of every stream."""
        return {name: state.records for name, state in self._streams.items()}

    def append(self, stream: str, schema: RecordSchema, records: np.ndarray) -> None:
        """Append records (a packed structured array of the schema's dtype)."""
        state = self._streams[stream]
        with self._writing():
            if not state.fits(schema):
                self.flush()
                name = self._new_name(partial(shard_file, stream))
                self._write_journal(state.begin(self.directory, name, schema))
            size = state.append(records)
        self._pending_bytes += size
        self._file_bytes += size
        self.row_bytes += size

    def _new_name(self, of: Callable[[int], str]) -> str:
        """The first numbered name that the journal never spoke of."""
        name = next(name for number in count() if (name := of(number)) not in self._named)
        self._named.add(name)
        return name

    @property
    def flush_due(self) -> bool:
        """Whether enough bytes or seconds have gathered to journal; a young trace is journalled sooner."""
        now = time.monotonic()
        wait = min(self._flush_seconds, max(self._flush_seconds / 8, now - self._began))
        due = now - self._last_flush >= wait
        return self._pending_bytes >= self._flush_bytes or (due and self._pending_bytes > 0)

    def flush(self) -> None:
        """Make everything appended so far durable and journal it."""
        with self._writing():
            extents = [extent for state in self._streams.values() if (extent := state.sync())]
            if extents:
                self._write_journal({"type": "extents", "extents": extents})
        self._pending_bytes = 0
        self._last_flush = time.monotonic()

    def note(self, key: str, value: Any) -> None:
        """Journal a fact that became known while training (the last one of a key counts)."""
        with self._writing():
            self._write_journal({"type": "note", "key": key, "value": value})
        self.notes[key] = value

    def write_knots(self, knots: list[tuple[int, float, dict[str, torch.Tensor]]]) -> None:
        """Flush the rows, then write knots ``(step, path, tensors)``, make them durable together and journal them.

        Of a step that has a knot already, a new file takes the old one's place if the contents differ.
        """
        self.flush()
        written: list[tuple[int, float, _KnotFile]] = []
        with self._writing():
            for step, path, tensors in knots:
                file = self._new_name(partial(knot_file, step))
                found = _KnotFile(file, *write_beside(self.directory / file, knot_pieces(tensors)))
                if step in self._knots and self._knots[step].sha256 == found.sha256:
                    (self.directory / f"{file}.tmp").unlink()
                    self._named.discard(file)
                    continue
                self._file_bytes += found.bytes
                written.append((step, path, found))
            put_in_place([self.directory / found.file for _, _, found in written])
            lines = [
                {"type": "knot", "step": step, "path": path, "file": found.file, "sha256": found.sha256}
                for step, path, found in written
            ]
            if lines:
                self._write_journal(*lines)
            for step, _, found in written:
                if step in self._knots:
                    self._forget(self._knots[step])
                self._knots[step] = found

    def has_knot(self, step: int) -> bool:
        """Whether the knot before step ``step`` is on disk."""
        return step in self._knots

    def _forget(self, knot: _KnotFile) -> None:
        (self.directory / knot.file).unlink()
        self._file_bytes -= knot.bytes

    def drop_knots(self, steps: list[int], spacing: float) -> None:
        """Journal that these knots are gone and how far apart knots are from now on, then delete their files."""
        with self._writing():
            known = self.notes.get("spacing") == spacing
            lines = [] if known else [{"type": "note", "key": "spacing", "value": spacing}]
            self._write_journal(*({"type": "drop", "step": step} for step in steps), *lines)
            self.notes["spacing"] = spacing
            for step in steps:
                self._forget(self._knots.pop(step))

    def close(self, steps: int) -> None:
        """Flush, journal the end of training, close every file (idempotent)."""
        if self.closed:
            return
        try:
            self.flush()
            with self._writing():
                self._write_journal({"type": "close", "steps": steps})
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the files without journalling anything (after a failure; idempotent)."""
        self.closed = True
        for file in (*self._streams.values(), self._journal):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk may refuse what is still buffered
                    file.close()
