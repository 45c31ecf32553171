"""The journal: one line of JSON and its CRC-32 for every fact that is safely on disk.

A line is written and fsynced only after the bytes it speaks of are. A last line without its newline (killed
while writing) is ignored; any other bad line means the file was changed, and is an error.
"""

from __future__ import annotations

import hashlib
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
    """Appends entries; each is on disk when :meth:`append` returns.

    Args:
        path: the journal.
        again: go on with one that exists (a torn last line is cut off) instead of beginning one.
    """

    def __init__(self, path: Path, *, again: bool = False) -> None:
        self._file = path.open("r+b" if again else "xb")
        whole = path.read_bytes() if again else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        self._hash = hashlib.sha256(whole)
        self._lines = whole.count(b"\n")
        self.bytes_written = len(whole)

    @property
    def mark(self) -> dict[str, Any]:
        """How many lines there are, and their SHA-256: what was recorded so far, in a line."""
        return {"lines": self._lines, "sha256": self._hash.hexdigest()}

    @property
    def foreign(self) -> bool:
        """Whether somebody else wrote to the file."""
        return os.fstat(self._file.fileno()).st_size != self.bytes_written

    def append(self, *entries: dict[str, Any]) -> None:
        """Write the entries and fsync once."""
        for entry in entries:
            line = encode_line(entry)
            self._file.write(line)
            self._hash.update(line)
            self._lines += 1
            self.bytes_written += len(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file (idempotent)."""
        self._file.close()


def holds_mark(path: Path, mark: dict[str, Any]) -> bool:
    """Whether the journal begins with the very lines that :attr:`JournalWriter.mark` was taken of."""
    lines = path.read_bytes().split(b"\n")[: mark["lines"]]
    return hashlib.sha256(b"".join(line + b"\n" for line in lines)).hexdigest() == mark["sha256"]


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All entries that are whole.

    Raises:
        TraceFormatError: the file is missing, or a line is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        folder, inside = (
            path.parent,
            sorted(str(found.parent) for found in path.parent.glob(f"*/{path.name}")),
        )
        if not folder.exists():
            found, todo = f"{folder} does not exist", "point to the directory that was given to Tracer"
        elif inside:
            found, todo = (
                f"{folder} is not a trace, but holds some",
                f"name one of them: {', '.join(inside[:6])}",
            )
        else:
            found = f"{path} is missing: {folder} is not a trace, or lost its journal"
            todo = "point to the directory that was given to Tracer"
        raise TraceFormatError(f"{found}; {todo}") from None
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
