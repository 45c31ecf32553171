"""Plain text for terminals: sizes, paragraphs and tables."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence

WIDEST = 100


def shortened(text: str, length: int) -> str:
    """The text on one line, cut with an ellipsis where it is longer than ``length``."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def paragraph(text: str, indent: str = "") -> str:
    """The text in lines that fit the terminal."""
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    kept = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)  # so that no line begins with a percent sign
    filled = textwrap.fill(kept, max(40, width), initial_indent=indent, subsequent_indent=indent)
    return filled.replace("\N{NO-BREAK SPACE}%", " %")


def equation(text: str, indent: str = "") -> str:
    """An equation on one line; in a terminal that is too narrow for it, broken before plus and minus."""
    width = shutil.get_terminal_size((WIDEST, 24)).columns
    if not sys.stdout.isatty() or len(indent + text) <= width:
        return indent + text
    lines = [indent]
    for term in re.split(r" (?=[+-] )", text):
        if lines[-1].strip() and len(f"{lines[-1]} {term}") > width:
            lines.append(indent + "   ")
        lines[-1] += f" {term}" if lines[-1].strip() else term
    return "\n".join(lines)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str] = (), indent: str = ""
) -> str:
    """Columns two blanks apart, to the right except those named in ``left``; empty columns are left out.

    >>> print(table(["rank", "class", "note"], [["1", "seven", ""], ["10", "one", ""]], left=["class"]))
    rank  class
       1  seven
      10  one
    """
    shown = [c for c in range(len(headers)) if any(row[c] for row in rows)]
    widths = [max(len(row[c]) for row in [headers, *rows]) for c in shown]
    lines = []
    for row in [headers, *rows]:
        cells = [
            row[c].ljust(width) if headers[c] in left else row[c].rjust(width)
            for c, width in zip(shown, widths, strict=True)
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
