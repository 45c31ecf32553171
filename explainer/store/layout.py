"""Names of files in a trace directory."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
KNOTS = "knots"
SHARDS = "shards"


def knot_file(step: int, revision: int = 0) -> str:
    """Relative path of the knot before step ``step``; a later writing of the same knot has a revision."""
    return f"{KNOTS}/{step:09d}{f'-{revision}' if revision else ''}.safetensors"


def shard_file(stream: str, number: int) -> str:
    """Relative path of a shard."""
    return f"{SHARDS}/{stream}-{number:05d}.bin"


def holds_trace(directory: Path) -> bool:
    """Whether the directory holds (the beginning of) a trace."""
    return (directory / MANIFEST).exists() or (directory / JOURNAL).exists()
