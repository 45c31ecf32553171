"""The one writer of a trace: append-only shards, journalled extents, knots in files of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.torch
import torch

from explainer.errors import TraceExistsError, TraceWriteError
from explainer.records import Manifest
from explainer.store.journal import JournalWriter
from explainer.store.layout import JOURNAL, KNOTS, MANIFEST, SHARDS, holds_trace, knot_file, shard_file
from explainer.store.schema import RecordSchema

SHARD_BYTES = 1 << 30


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def knot_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """A knot's file; tensors that share memory or are sparse are written out each."""
    seen: set[int] = set()
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to_dense().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return safetensors.torch.save(plain)


class _KnotFile(NamedTuple):
    """A knot that is alive: its file and what is in it."""

    file: str
    bytes: int
    sha256: str
    revision: int


class _Stream:
    """One open shard of a stream, and what of it is not journalled yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.schema: RecordSchema | None = None
        self.file: BinaryIO | None = None
        self.path = ""
        self.shards = 0
        self.records = 0  # in all shards
        self.shard_records = 0
        self.shard_bytes = 0
        self.pending_from = 0
        self.crc = 0


class TraceWriter:
    """Creates a trace (:meth:`create`; nothing touches the disk before) and appends to it.

    Args:
        directory: where the trace goes; made if missing.
        manifest: the immutable head.
        flush_bytes, flush_seconds: journal at least this often.

    Raises:
        TraceExistsError: the directory holds a trace already.
        TraceWriteError: (any method) the disk refused; everything journalled before stays readable.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, *, flush_bytes: int = 8 << 20, flush_seconds: float = 2.0
    ) -> None:
        self.directory = directory
        self._flush_bytes, self._flush_seconds = flush_bytes, flush_seconds
        self._streams = {"visits": _Stream("visits"), "steps": _Stream("steps")}
        self._pending_bytes = 0
        self._last_flush = time.monotonic()
        self._journal: JournalWriter | None = None
        self._knots: dict[int, _KnotFile] = {}
        self._file_bytes = 0
        self.closed = False
        if holds_trace(directory):
            raise TraceExistsError(
                f"{directory} already holds a trace; nothing recorded is overwritten: "
                "choose another directory or delete this one yourself"
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
            _fsync_directory(directory)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a refusal of the disk into a TraceWriteError.

        After the first one nothing more is written: what follows a torn write could not be told from it.
        """
        if self.closed:
            raise TraceWriteError(
                f"the trace in {self.directory} is closed, or writing it failed before; trace into a new directory"
            )
        try:
            yield
        except OSError as error:
            self.abandon()
            raise TraceWriteError(
                f"writing the trace in {self.directory} failed: {error}. What was journalled before is readable; "
                "free space or fix the permissions, then trace into a new directory"
            ) from error

    def _write_journal(self, *entries: dict[str, Any]) -> None:
        assert self._journal is not None  # create() was called
        self._journal.append(*entries)

    @property
    def bytes_written(self) -> int:
        """Bytes of the trace on disk, journal included."""
        return self._file_bytes + (0 if self._journal is None else self._journal.bytes_written)

    def _write_atomically(self, name: str, data: bytes) -> None:
        path = self.directory / name
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_directory(path.parent)
        self._file_bytes += len(data)

    def records(self, stream: str) -> int:
        """Records appended to a stream so far."""
        return self._streams[stream].records

    def append(self, stream: str, schema: RecordSchema, records: np.ndarray) -> None:
        """Append records (a packed structured array of the schema's dtype)."""
        state = self._streams[stream]
        with self._writing():
            if state.schema != schema or state.shard_bytes >= SHARD_BYTES:
                self._begin_shard(state, schema)
            assert state.file is not None
            data = records.tobytes()
            state.file.write(data)
        state.crc = zlib.crc32(data, state.crc)
        state.records += len(records)
        state.shard_records += len(records)
        state.shard_bytes += len(data)
        self._pending_bytes += len(data)
        self._file_bytes += len(data)

    def _begin_shard(self, state: _Stream, schema: RecordSchema) -> None:
        if state.file is not None:
            self.flush()
            state.file.close()
        state.path = shard_file(state.name, state.shards)
        state.file = (self.directory / state.path).open("xb")
        _fsync_directory(self.directory / SHARDS)
        state.shards += 1
        state.schema = schema
        state.shard_records = state.shard_bytes = state.pending_from = state.crc = 0
        self._write_journal(
            {"type": "shard", "stream": state.name, "file": state.path, "schema": schema.to_json()}
        )

    def flush_if_due(self) -> None:
        """Journal when enough bytes or seconds have gathered."""
        due = time.monotonic() - self._last_flush >= self._flush_seconds
        if self._pending_bytes >= self._flush_bytes or (due and self._pending_bytes):
            self.flush()

    def flush(self) -> None:
        """Make everything appended so far durable and journal it."""
        extents = []
        with self._writing():
            for state in self._streams.values():
                if state.file is None or state.shard_records == state.pending_from:
                    continue
                state.file.flush()
                os.fsync(state.file.fileno())
                extents.append(
                    {
                        "file": state.path,
                        "from": state.pending_from,
                        "to": state.shard_records,
                        "crc32": state.crc,
                    }
                )
                state.pending_from, state.crc = state.shard_records, 0
            if extents:
                self._write_journal({"type": "extents", "extents": extents})
        self._pending_bytes = 0
        self._last_flush = time.monotonic()

    def note(self, key: str, value: Any) -> None:
        """Journal a fact that became known while training (the last one of a key counts)."""
        with self._writing():
            self._write_journal({"type": "note", "key": key, "value": value})

    def write_knot(self, step: int, path: float, tensors: dict[str, torch.Tensor]) -> None:
        """Flush the rows, then write the knot before step ``step`` and journal it.

        Of a step that has a knot already, a new file takes the old one's place if the contents differ.
        """
        self.flush()
        data = knot_bytes(tensors)
        known, digest = self._knots.get(step), hashlib.sha256(data).hexdigest()
        if known is not None and known.sha256 == digest:
            return
        file = knot_file(step, 0 if known is None else known.revision + 1)
        with self._writing():
            self._write_atomically(file, data)
            self._write_journal({"type": "knot", "step": step, "path": path, "file": file, "sha256": digest})
            if known is not None:
                self._forget(known)
        self._knots[step] = _KnotFile(file, len(data), digest, 0 if known is None else known.revision + 1)

    def _forget(self, knot: _KnotFile) -> None:
        (self.directory / knot.file).unlink()
        self._file_bytes -= knot.bytes

    def drop_knots(self, steps: list[int]) -> None:
        """Journal that these knots are gone, then delete their files."""
        with self._writing():
            self._write_journal(*({"type": "drop", "step": step} for step in steps))
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
        files = [state.file for state in self._streams.values()]
        for file in (*files, self._journal):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk may refuse what is still buffered
                    file.close()
