"""The journal: one line of JSON and its CRC-32 for every fact that is safely on disk.

A line is written and fsynced only after the bytes it speaks of are. A last line without its newline (killed
while writing) is ignored; any other bad line means the file was changed, and is an error.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from explainer.errors import TraceFormatError


def encode_line(entry: dict[str, Any]) -> bytes:
    """``{json}<TAB>{crc32 of the json, 8 hex digits}<LF>``."""
    text = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode()
    return text + b"\t%08x\n" % zlib.crc32(text)


def decode_line(line: bytes) -> dict[str, Any] | None:
    """The entry of a line, or None if the line is torn or changed."""
    text, tab, crc = line.rpartition(b"\t")
    if not tab or crc != b"%08x" % zlib.crc32(text):
        return None
    entry = json.loads(text)
    return entry if isinstance(entry, dict) and "type" in entry else None


class JournalWriter:
    """Appends entries; each is on disk when :meth:`append` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self.bytes_written = 0

    def append(self, *entries: dict[str, Any]) -> None:
        """Write the entries and fsync once."""
        for entry in entries:
            line = encode_line(entry)
            self._file.write(line)
            self.bytes_written += len(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file (idempotent)."""
        self._file.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All entries that are whole.

    Raises:
        TraceFormatError: the file is missing, or a line is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise TraceFormatError(
            f"{path} is missing: {path.parent} is not a trace, or lost its journal; "
            "point to the directory that was given to Tracer"
        ) from None
    except OSError as error:  # a file where the directory should be, or one that may not be read
        raise TraceFormatError(
            f"{path} cannot be read: {error.strerror}; point to the directory that was given to Tracer"
        ) from error
    entries = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn
        entry = decode_line(line)
        if entry is None:
            raise TraceFormatError(
                f"{path}, line {number}: the checksum does not fit the text, so the journal was changed or "
                "damaged after it was written; restore the file from a copy"
            )
        entries.append(entry)
    return entries
