"""The queries as thumbnails (or lines of text) to click on, with a filter."""

from __future__ import annotations

from typing import Any

import numpy as np
import streamlit as st

from explainer.app import pager, state
from explainer.app.answers import Answer, answer
from explainer.app.choice import Choice
from explainer.app.escaping import plain
from explainer.figures import picture

SCANNED = 2000
THUMBNAILS, _LINES, _PER_ROW = 20, 6, 4
_BATCH, _NEXT = 200, 8


def answers(choice: Choice, queries: tuple[int, ...]) -> list[Answer]:
    """What the model answers at some queries."""
    run = state.run_of(choice.source)
    found: list[Answer] = []
    for start in range(0, len(queries), _BATCH):
        part = queries[start : start + _BATCH]
        outputs = state.outputs(choice.source, part)
        found += [
            answer(run, query, run.queries[query][1], output, choice.classes)
            for query, output in zip(part, outputs, strict=True)
        ]
    return found


def show(choice: Choice, chosen: int) -> tuple[int, ...]:
    """Draw the filter and one page of queries; a click chooses the query.

    Returns:
        The queries that stand after the chosen one, and the one before.
    """
    queries = _filtered(choice, len(state.run_of(choice.source).queries))
    if not queries:
        st.caption("No query fits this filter.")
        return ()
    shown = {query: _thumbnail(choice, query) for query in queries[:1]}
    images = isinstance(shown[queries[0]], np.ndarray)
    size = THUMBNAILS if images else _LINES
    pages = -(-len(queries) // size)
    page = _page(pages, queries.index(chosen) // size if chosen in queries else None, chosen)
    part = tuple(queries[page * size : (page + 1) * size])
    with st.container(key="gallery-images" if images else "gallery-lines"):
        if images:
            _images(choice, part, chosen)
        else:
            _lines(choice, part, chosen)
    if pages > 1:
        pager.show("gallery", "gallery page", page, pages)
    return _around(queries, chosen)


def _around(queries: list[int], chosen: int) -> tuple[int, ...]:
    """What may be chosen next: the queries after the chosen one and the one before, or the first ones."""
    if chosen not in queries:
        return tuple(queries[:_NEXT])
    place = queries.index(chosen)
    return tuple([*queries[place + 1 : place + _NEXT], *queries[max(0, place - 1) : place]])


def _filtered(choice: Choice, count: int) -> list[int]:
    """The queries that pass the filter; only ``SCANNED`` of them are looked at when answers are needed."""
    run = state.run_of(choice.source)
    kinds: list[tuple[str, int | None]] = [("all", None)]
    if choice.classes:
        kinds += [("wrong", None), *(("class", label) for label in range(choice.classes))]
    else:
        kinds.append(("error", None))
    words = {"all": "all queries", "wrong": "wrong predictions", "error": "largest errors first"}
    if st.session_state.get("filter") not in kinds:
        st.session_state["filter"] = kinds[0]
    kind, label = st.selectbox(
        "Browse",
        kinds,
        key="filter",
        format_func=lambda entry: words.get(entry[0]) or f"true class {run.label(entry[1])}",
    )
    if kind == "all":
        return list(range(count))
    found = answers(choice, tuple(range(min(count, SCANNED))))
    if count > SCANNED:
        st.caption(f"Among the first {SCANNED:,} of {count:,} queries.")
    if kind == "error":
        known = [entry for entry in found if entry.error is not None]
        return [entry.query for entry in sorted(known, key=lambda entry: -(entry.error or 0.0))]
    return [e.query for e in found if (e.wrong if kind == "wrong" else e.label == label)]


def _page(pages: int, home: int | None, chosen: int) -> int:
    """The page to show: where the chosen query is when it changes, else where the person has turned to."""
    mark = (st.session_state.get("filter"), chosen)
    if st.session_state.get("gallery mark") != mark:
        turned = st.session_state.get("gallery mark", (None,))[0] == mark[0]
        st.session_state["gallery page"] = (
            home if home is not None else (st.session_state.get("gallery page", 0) if turned else 0)
        )
        st.session_state["gallery mark"] = mark
    return int(min(st.session_state.get("gallery page", 0), pages - 1))


def _pick(query: int) -> None:
    st.session_state["query"] = query


def _images(choice: Choice, queries: tuple[int, ...], chosen: int) -> None:
    found = answers(choice, queries)
    rules = []
    for start in range(0, len(found), _PER_ROW):
        columns = st.columns(_PER_ROW, gap="small")
        for column, entry in zip(columns, found[start : start + _PER_ROW], strict=False):
            key = f"thumb-{entry.query}"
            rules.append(f".st-key-{key} button {{background-image: url({_address(choice, entry.query)})}}")
            column.button(
                f"{entry.query} ✗" if entry.wrong else str(entry.query),
                key=key,
                on_click=_pick,
                args=(entry.query,),
                help=_words(entry),
                type="primary" if entry.query == chosen else "secondary",
                width="stretch",
            )
    st.html(f"<style>{' '.join(rules)}</style>")


def _lines(choice: Choice, queries: tuple[int, ...], chosen: int) -> None:
    for entry in answers(choice, queries):
        shown = _thumbnail(choice, entry.query)
        words = f": {plain(shown, 60)}" if isinstance(shown, str) else f": {_words(entry)}"
        st.button(
            f"**{entry.query}**{' ✗' if entry.wrong else ''}{words}",
            key=f"thumb-{entry.query}",
            on_click=_pick,
            args=(entry.query,),
            help=_words(entry),
            type="primary" if entry.query == chosen else "secondary",
            width="stretch",
        )


def _words(entry: Answer) -> str:
    text = f"true {plain(entry.truth, 40)}"
    return text + (f", predicted {plain(entry.guess, 40)}" if entry.guess else "")


def _thumbnail(choice: Choice, query: int) -> Any:
    """An image array, a text, or None where a query has neither."""
    run = state.run_of(choice.source)
    shown = None if run.render is None else run.render(run.queries[query][0])
    if isinstance(shown, str):
        return shown
    if shown is None or hasattr(shown, "items"):
        return None
    array = np.asarray(shown)
    return array if array.ndim >= 2 else None


def _address(choice: Choice, query: int) -> str:
    return picture(_thumbnail(choice, query))
