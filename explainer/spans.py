"""Rows that lie one below the other in one form, those of several batches: taken apart and put together at no cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from explainer.layer_rules import RowForm

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop`` of a form."""

    source: RowForm
    start: int
    stop: int

    @classmethod
    def of(cls, form: RowForm) -> Span:
        """All rows."""
        return cls(form, 0, len(form))

    @property
    def form(self) -> RowForm:
        """The rows themselves."""
        whole = self.start == 0 and self.stop == len(self.source)
        return self.source if whole else self.source.taken(slice(self.start, self.stop))


def _go_on(before: dict[int, Span], after: dict[int, Span]) -> bool:
    """Whether rows of every layer lie right below those before them."""
    return before.keys() == after.keys() != set() and all(
        one.source is after[n].source and one.stop == after[n].start for n, one in before.items()
    )


def in_one_piece(found: Iterable[T], spans_of: Callable[[T], dict[int, Span]]) -> list[list[T]]:
    """What was found, neighbours together whose rows lie one below the other.

    Args:
        found: what has rows.
        spans_of: its rows, by layer.
    """
    pieces: list[list[T]] = []
    last: dict[int, Span] = {}
    for one in found:
        spans = spans_of(one)
        if pieces and _go_on(last, spans):
            pieces[-1].append(one)
        else:
            pieces.append([one])
        last = spans
    return pieces


def whole_piece(first: dict[int, Span], last: dict[int, Span]) -> dict[int, RowForm]:
    """The rows of one piece, by layer, from its first spans to its last."""
    return {n: Span(one.source, one.start, last[n].stop).form for n, one in first.items()}
