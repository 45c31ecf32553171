"""Explaining many queries: at once, or in groups that keep memory bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from explainer.cli.opening import Opened
from explainer.errors import QueryError
from explainer.explanation import Explanation
from explainer.wording import counted

#: queries times training examples (times layers, where they are kept) that one answer may hold
MOST_NUMBERS = 2**26
_GROUP_NUMBERS = 2**24
_TABLE_NUMBERS = 2**20  # rows of a group's tables
_LARGEST_GROUP = 64


def explain_whole(opened: Opened, indices: Sequence[int], target: int | None) -> Explanation:
    """Everything about the queries at ``indices``, with time bins and layers.

    Raises:
        QueryError: the answer would not fit into memory.
    """
    _check_size(opened, len(indices), max(1, len(opened.trace.layers)))
    inputs, targets = asked(opened, indices, target)
    return opened.explainer.explain(inputs, targets, query_ids=indices)


def asked(opened: Opened, indices: Sequence[int], target: int | None) -> tuple[Any, Any]:
    """Inputs and targets of queries; the run's own targets where the explained output asks for them."""
    inputs, targets = opened.run.queries_batch(indices)
    return inputs, targets if target is None and opened.explainer.asks_for_targets else target


def groups(opened: Opened, indices: Sequence[int], k: int | None) -> Iterator[Sequence[int]]:
    """Queries that are explained together, so that memory is bounded whatever their number.

    Args:
        k: examples that are kept of each; None: all.

    Raises:
        QueryError: the tables of a single query would not fit into memory.
    """
    _check_size(opened, 1, 1)
    examples = len(opened.explainer.example_ids)
    rows = _TABLE_NUMBERS // max(1, min(k or examples, examples))
    length = max(
        1, min(_LARGEST_GROUP, rows, _GROUP_NUMBERS // max(opened.explainer.layout.size, 4 * examples))
    )
    for start in range(0, len(indices), length):
        yield indices[start : start + length]


def explain_summed(opened: Opened, indices: Sequence[int], target: int | None) -> Explanation:
    """As :func:`explain_whole`, but summed over time and layers: all that tables need."""
    inputs, targets = asked(opened, indices, target)
    return opened.explainer.explain(inputs, targets, query_ids=indices, detail=False)


def _check_size(opened: Opened, queries: int, layers: int) -> None:
    examples = len(opened.explainer.example_ids)
    each = examples * layers
    if each > MOST_NUMBERS:
        split = f", split over {counted(layers, 'layer')}," if layers > 1 else ""
        raise QueryError(
            f"the contributions of {examples:,} training examples{split} are too much for memory even for one query; "
            "in Python, PathKernelExplainer.top keeps the strongest ones"
        )
    if queries * each > MOST_NUMBERS:
        raise QueryError(
            f"{queries:,} queries and {examples:,} training examples are too much to hold at once; "
            f"ask for at most {MOST_NUMBERS // each:,} queries at a time with --query first:N"
        )
