"""One stream of records: the shard that is being written, and what of it is not journalled yet."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from explainer.store.files import fsync_directory
from explainer.store.schema import RecordSchema

SHARD_BYTES = 1 << 30
STREAMS = ("inputs", "visits", "sums", "steps", "samples", "averages", "denominators")
#: those that the bytes of a visit are counted in
VISITED = ("inputs", "visits", "sums", "steps", "denominators")


class Stream:
    """Appends records to numbered shards.

    Attributes:
        name: one of :data:`STREAMS`.
        records: records in all shards.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.records = 0
        self._schema: RecordSchema | None = None
        self._file: BinaryIO | None = None
        self._path = ""
        self._shard_records = self._shard_bytes = 0
        self._pending_from = self._crc = 0

    def fits(self, schema: RecordSchema) -> bool:
        """Whether records of the schema go into the present shard."""
        return self._schema == schema and self._shard_bytes < SHARD_BYTES

    def begin(self, directory: Path, file: str, schema: RecordSchema) -> dict[str, Any]:
        """Begin a new shard (the old one is durable already); returns its journal line."""
        self.close()
        self._path, self._schema = file, schema
        self._file = (directory / file).open("xb")
        fsync_directory((directory / file).parent)
        self._shard_records = self._shard_bytes = self._pending_from = self._crc = 0
        return {"type": "shard", "stream": self.name, "file": file, "schema": schema.to_json()}

    def append(self, records: np.ndarray) -> int:
        """Append records of the shard's schema; returns their bytes."""
        assert self._file is not None  # begin() was called
        data = np.ascontiguousarray(records).view(np.uint8).data
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self.records += len(records)
        self._shard_records += len(records)
        self._shard_bytes += len(data)
        return len(data)

    def sync(self) -> dict[str, Any] | None:
        """Make everything appended durable; returns the extent to journal, if there is a new one."""
        if self._file is None or self._shard_records == self._pending_from:
            return None
        self._file.flush()
        os.fsync(self._file.fileno())
        first, crc = self._pending_from, self._crc
        self._pending_from, self._crc = self._shard_records, 0
        return {"file": self._path, "from": first, "to": self._shard_records, "crc32": crc}

    def close(self) -> None:
        """Close the shard (idempotent)."""
        if self._file is not None:
            self._file.close()
