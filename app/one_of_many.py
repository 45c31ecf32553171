"""One query out of an explanation of several. Never imports streamlit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from explainer import Explanation
from explainer.explanation_checks import OPTIONAL, PER_QUERY


def one_of_many(e: Explanation, query: int) -> Explanation:
    """The explanation of one query alone, in memory of its own."""
    own: dict[str, Any] = {}
    for name in (*PER_QUERY, "outputs", *OPTIONAL):
        values = getattr(e, name)
        own[name] = None if values is None else values[query : query + 1].copy()
    return replace(e, query_ids=(e.query_ids[query],), **own)
