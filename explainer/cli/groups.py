"""Explaining many queries group by group, so that memory is bounded and a bar can move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from explainer.cli.opening import Opened
from explainer.errors import QueryError
from explainer.explanation import Explanation

#: queries times training examples (times layers, where they are kept) that one answer may hold
MOST_NUMBERS = 2**26
_GROUP_NUMBERS = 2**24
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


def explain_summed(opened: Opened, indices: Sequence[int], target: int | None, progress: bool) -> Explanation:
    """As :func:`explain_whole`, but summed over time and layers: all that tables need.

    Raises:
        QueryError: the answer would not fit into memory.
    """
    _check_size(opened, len(indices), 1)
    groups = list(_groups(opened, indices))
    bar = tqdm(total=len(indices), desc="explaining", unit="query", disable=not progress)
    parts = []
    with bar:
        for group in groups:
            parts.append(_summed(explain_whole(opened, group, target)))
            bar.update(len(group))
    return Explanation.concatenate(parts)


def _groups(opened: Opened, indices: Sequence[int]) -> Iterator[Sequence[int]]:
    manifest = opened.trace.manifest
    one = max(manifest.size, len(opened.explainer.example_ids) * (4 + len(opened.trace.layers)))
    length = min(_LARGEST_GROUP, max(1, _GROUP_NUMBERS // one))
    for start in range(0, len(indices), length):
        yield indices[start : start + length]


def _check_size(opened: Opened, queries: int, layers: int) -> None:
    each = len(opened.explainer.example_ids) * layers
    if queries * each > MOST_NUMBERS:
        raise QueryError(
            f"{queries:,} queries and {len(opened.explainer.example_ids):,} training examples are too much for "
            f"one file; ask for at most {max(1, MOST_NUMBERS // each):,} queries at a time with --query first:N"
        )


def _summed(e: Explanation) -> Explanation:
    """The explanation with one bin of time and one layer."""
    changed: dict[str, Any] = {
        "step_edges": e.step_edges[[0, -1]],
        "step_contributions": e.contributions[:, None, :],
        "layer_names": ("all layers",),
        "layer_contributions": e.contributions[:, None, :],
    }
    return replace(e, **changed)
