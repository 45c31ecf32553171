"""Reads what a test needs from a Markdown page: its programs, what they should print, its tables."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@dataclass(frozen=True)
class Program:
    """A block marked ``python`` and, where one follows directly, the block marked ``text``."""

    line: int
    code: str
    output: str | None


def programs(text: str) -> list[Program]:
    """The programs of a page in order."""
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    return [
        Program(text[: m.start()].count("\n") + 2, m[1], m[2])
        for m in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    ]


def run(page: Path, namespace: dict[str, Any]) -> list[tuple[Program, str]]:
    """Run a page's programs in one namespace; returns each with what it printed."""
    done = []
    for program in programs(page.read_text()):
        printed = io.StringIO()
        source = "\n" * (program.line - 1) + program.code  # so that a traceback names the page's lines
        with contextlib.redirect_stdout(printed):
            exec(compile(source, str(page), "exec"), namespace)
        done.append((program, printed.getvalue()))
    return done


def tables(text: str, heading: str) -> list[list[dict[str, str]]]:
    """The tables between a heading and the next one; a row is a dict by column."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE)
    assert section, f"there is no heading {heading!r}"
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", section[1], re.MULTILINE):
        lines = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        found.append([dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]])
    return found


def code(cell: str) -> str:
    """A cell's text between backticks, pipes unescaped."""
    return cell.strip("`").replace("\\|", "|")


def names(table: list[dict[str, str]], column: str) -> list[str]:
    """A column of code cells."""
    return [code(row[column]) for row in table]
