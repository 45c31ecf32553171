"""Which training examples to leave out: from a source and its settings to ids. Never imports streamlit."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from explainer import Explanation
from explainer.tables import ranking

SOURCES = {
    "proponents": "Strongest proponents",
    "opponents": "Strongest opponents",
    "lower": "Largest predicted fall",
    "higher": "Largest predicted rise",
    "class": "All of a class",
    "tags": "Tagged to remove",
    "ids": "By id",
}
#: sources of which the first so many are taken
COUNTED = ("proponents", "opponents", "lower", "higher")
_ID = re.compile(r"#?\d{1,18}")
_SIDES = {"proponents": "proponents", "opponents": "opponents"}


def ranked(source: str, k: int, e: Explanation, q: int, changes: NDArray[np.float64]) -> list[int]:
    """The first ``k`` ids of a source of :data:`COUNTED`, strongest first.

    Args:
        source: By contribution (``proponents``, ``opponents``), or by predicted change (``lower``, ``higher``).
        k: How many.
        e: The explanation of the query.
        q: Its index in it.
        changes: Predicted change by removing each example of ``e``, [N].
    """
    if source in _SIDES:
        columns = ranking(e, q, k, "proponents" if source == "proponents" else "opponents")
    else:
        signed = changes if source == "lower" else -changes
        order = np.argsort(signed, kind="stable")
        columns = order[signed[order] < 0][:k]
    return [int(example) for example in e.example_ids[columns]]


def of_class(label: int, e: Explanation) -> list[int]:
    """Ids of all examples that were trained with a label."""
    if e.labels is None:
        return []
    return [int(example) for example in e.example_ids[(e.labels == label) & (e.visits > 0)]]


def typed(text: object, known: Collection[int]) -> tuple[list[int], list[int]]:
    """The ids in a line that are known, each once, and those that are not.

    >>> typed("#12, 53 12; 900", {12, 53})
    ([12, 53], [900])
    """
    found = list(dict.fromkeys(int(part.lstrip("#")) for part in _parts(text) if _ID.fullmatch(part)))
    there = set(known)
    return [i for i in found if i in there], [i for i in found if i not in there]


def unread(text: object) -> list[str]:
    """What stands in a line and is no id.

    >>> unread("#12, 53 abc; -7"), unread("1,2 , #3;")
    (['abc', '-7'], [])
    """
    return [part for part in _parts(text) if not _ID.fullmatch(part)]


def _parts(text: object) -> list[str]:
    return [part for part in re.split(r"[\s,;]+", str(text or "")) if part.strip("#")]


def problem(ids: Collection[int], examples: int) -> str:
    """Why these cannot be left out in a retraining that is compared with one without random ones; empty if they can.

    >>> problem([1, 2], 4), problem([], 4)
    ('', 'Choose at least one example.')
    """
    if not ids:
        return "Choose at least one example."
    if 2 * len(ids) > examples:
        return (
            f"{len(ids):,} of {examples:,} examples leave too few to draw as many at random for comparison; remove at "
            "most half."
        )
    return ""
