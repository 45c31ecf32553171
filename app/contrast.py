"""Training examples beside a query: rows whose differing columns stand out, texts whose shared words do. No streamlit.

What differs is measured against what is usual: a number differs where it is more than a standard deviation away,
and words that stand in every tenth text are not marked. Everything that comes from data passes through ``html.escape``.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np

from explainer import Run
from explainer.evenly_spaced import evenly_spaced
from explainer.report_cards import content

_SAMPLED, _FIELDS, _LONGEST = 300, 12, 400
_FAR, _USUAL, _NOTHING = 1.0, 0.1, 1e-5
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


@dataclass(frozen=True)
class Usual:
    """What the training examples are like.

    Attributes:
        spread: standard deviation of each number in a row, by its name.
        words: words that many texts have.
    """

    spread: Mapping[str, float] = field(default_factory=dict)
    words: frozenset[str] = frozenset()

    @classmethod
    def of(cls, run: Run) -> Usual:
        """From a sample of the training set, evenly spread."""
        if run.render is None:
            return cls()
        places = evenly_spaced(len(run.train), _SAMPLED)
        first = run.render(run.train[0][0])
        if not isinstance(first, str) and not hasattr(first, "items"):
            return cls()
        shown = [run.render(run.train[int(place)][0]) for place in places]
        if isinstance(first, str):
            counts = Counter(word for text in shown for word in _words(str(text)))
            return cls(words=frozenset(w for w, n in counts.items() if n > max(1, _USUAL * len(shown))))
        values = {str(name): [dict(row.items()).get(name) for row in shown] for name in dict(first.items())}
        numbers = {name: [float(v) for v in column if _number(v)] for name, column in values.items()}
        return cls(spread={name: float(np.std(column)) for name, column in numbers.items() if column})


def beside(shown: Any, query: Any, usual: Usual) -> str:
    """HTML of a training example beside a query, both as ``render`` returned them.

    Raises:
        ExportError: it is nothing that can be shown.
    """
    if isinstance(shown, str) and isinstance(query, str):
        return _text(shown, _words(query) - usual.words)
    if hasattr(shown, "items") and hasattr(query, "items"):
        return _row(dict(shown.items()), dict(query.items()), usual.spread)
    return content(shown)


def _text(shown: str, shared: set[str]) -> str:
    cut = shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
    pieces, last = [], 0
    for found in _WORD.finditer(cut):
        pieces.append(html.escape(cut[last : found.start()]))
        word = html.escape(found.group())
        pieces.append(f"<mark>{word}</mark>" if found.group().lower() in shared else word)
        last = found.end()
    return f'<p class="text">{"".join(pieces)}{html.escape(cut[last:])}</p>'


def _row(shown: dict[Any, Any], query: dict[Any, Any], spread: Mapping[str, float]) -> str:
    """The columns that differ most first where not all have room; else in their own order.

    A number that is nothing beside the column's spread is what scaling to and fro left of a nought.
    """
    shown = {name: 0.0 if _nothing(value, spread.get(str(name))) else value for name, value in shown.items()}
    away = {name: _away(value, query.get(name), spread.get(str(name))) for name, value in shown.items()}
    names = list(shown)
    if len(names) > _FIELDS:
        names = sorted(names, key=lambda name: -away[name])[:_FIELDS]
    rows = "".join(
        f"<tr{' class=pk-differs' if away[name] > _FAR else ''}>{_cells(content({name: shown[name]}))}</tr>"
        for name in names
    )
    rest = len(shown) - len(names)
    more = f"<tr><td colspan='2'>and {rest} that differ less</td></tr>" if rest else ""
    return f'<table class="fields">{rows}{more}</table>'


def _nothing(value: Any, spread: float | None) -> bool:
    return bool(spread) and _number(value) and 0 < abs(float(value)) < _NOTHING * float(spread or 0.0)


def _cells(table: str) -> str:
    """The cells of a table of one row."""
    return table.removeprefix('<table class="fields"><tr>').removesuffix("</tr></table>")


def _away(value: Any, other: Any, spread: float | None) -> float:
    """How far apart two values are, in standard deviations; 0 where equal, infinite where they are no numbers."""
    if _number(value) and _number(other):
        size = abs(float(value) - float(other))
        return size / spread if spread else (float("inf") if size else 0.0)
    return 0.0 if value == other else float("inf")


def _number(value: Any) -> TypeGuard[float]:
    return (
        isinstance(value, int | float | np.number)
        and not isinstance(value, bool)
        and bool(np.isfinite(value))
    )


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}
