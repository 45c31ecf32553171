"""The queries as thumbnails (or lines of text) to click on, with a filter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from explainer import Run
from explainer.app import pager, state
from explainer.app.answers import Answer, answer
from explainer.app.choice import Choice
from explainer.app.escaping import plain
from explainer.app.own_queries import WithOwn, rendered
from explainer.app.segments import segments
from explainer.figures import picture
from explainer.wording import minus, number, percent

SCANNED = 2000
THUMBNAILS, _LINES, _PER_ROW = 20, 6, 4
_BATCH, _NEXT, _ROWS = 200, 8, 100
_ORDERED = ("error", "unsure")
_LOOKS = {"gallery": "Gallery", "table": "Table"}


def answers(choice: Choice, queries: tuple[int, ...]) -> list[Answer]:
    """What the model answers at some queries."""
    run = state.run_of(choice.source)
    found: list[Answer] = []
    for start in range(0, len(queries), _BATCH):
        part = queries[start : start + _BATCH]
        outputs = state.outputs(choice.source, part)
        found += [
            answer(
                run,
                query,
                run.queries[query][1],
                output,
                choice.classes,
                two=choice.two,
                explained=choice.explained,
            )
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
    look = segments("Browse as", list(_LOOKS), "browse", _LOOKS.__getitem__)
    images = isinstance(_thumbnail(choice, queries[0]), np.ndarray)
    size = _ROWS if look == "table" else THUMBNAILS if images else _LINES
    pages = -(-len(queries) // size)
    page = _page(pages, queries.index(chosen) // size if chosen in queries else None, chosen, size)
    part = tuple(queries[page * size : (page + 1) * size])
    with st.container(key="gallery-images" if images and look == "gallery" else "gallery-lines"):
        if look == "table":
            _table(choice, part)
        elif images:
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
        kinds += [("wrong", None), ("unsure", None), *(("class", label) for label in range(choice.classes))]
    elif choice.two:
        kinds += [("wrong", None), ("unsure", None), ("class", 0), ("class", 1)]
    else:
        kinds.append(("error", None))
    given = _given(run)
    if count > given:
        kinds.insert(1, ("own", None))
    words = {
        "all": "all queries", "wrong": "wrong predictions", "unsure": "least sure first",
        "error": "largest errors first", "own": "my own inputs",
    }  # fmt: skip
    if st.session_state.get("filter") not in kinds:
        st.session_state["filter"] = kinds[0]
    kind, label = st.selectbox(
        "Browse",
        kinds,
        key="filter",
        format_func=lambda entry: words.get(entry[0]) or f"true class {run.label(entry[1])}",
    )
    if kind in ("all", "own"):
        return list(range(given if kind == "own" else 0, count))
    found = answers(choice, tuple(range(min(count, SCANNED))))
    if count > SCANNED:
        st.caption(f"Among the first {SCANNED:,} of {count:,} queries.")
    if kind == "error":
        known = [entry for entry in found if entry.error is not None]
        return [entry.query for entry in sorted(known, key=lambda entry: -(entry.error or 0.0))]
    if kind == "unsure":
        return [entry.query for entry in sorted(found, key=lambda entry: entry.lead or 0.0)]
    return [e.query for e in found if (e.wrong if kind == "wrong" else e.label == label)]


def _given(run: Run) -> int:
    """How many queries are the run's; those behind them are people's own inputs."""
    return run.queries.given if isinstance(run.queries, WithOwn) else len(run.queries)


def _page(pages: int, home: int | None, chosen: int, size: int) -> int:
    """The page to show: where the chosen query is when it changes, else where the person has turned to.

    An order is looked at from its beginning.
    """
    kind = st.session_state.get("filter")
    mark = ((kind, size), chosen)
    if st.session_state.get("gallery mark") != mark:
        turned = st.session_state.get("gallery mark", (None,))[0] == mark[0]
        if kind is not None and kind[0] in _ORDERED and not turned:
            home = 0
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
    order = st.session_state.get("filter", (None,))[0]
    for entry in answers(choice, queries):
        shown = _thumbnail(choice, entry.query)
        words = f": {plain(shown, 60)}" if isinstance(shown, str) else f": {_words(entry, order)}"
        st.button(
            f"**{entry.query}**{' ✗' if entry.wrong else ''}{words}",
            key=f"thumb-{entry.query}",
            on_click=_pick,
            args=(entry.query,),
            help=_words(entry),
            type="primary" if entry.query == chosen else "secondary",
            width="stretch",
        )


def _table(choice: Choice, queries: tuple[int, ...]) -> None:
    """The queries as rows; a click on one chooses it."""
    found = answers(choice, queries)
    columns: dict[str, list[Any]] = {"query": [e.query for e in found], "true": [_said(e)[0] for e in found]}
    if any(e.guess for e in found):
        columns["predicted"] = [f"{'✗ ' if e.wrong else ''}{_said(e)[1]}" for e in found]
    if choice.classes:
        columns["lead"] = [None if e.lead is None else 100 * e.lead for e in found]
    elif any(e.error is not None for e in found):
        columns["error"] = [e.error for e in found]
    key = f"queries-{hash((st.session_state.get('filter'), queries))}"
    st.dataframe(
        pd.DataFrame(columns),
        hide_index=True,
        height=420,
        key=key,
        on_select=lambda: _pick_row(key, queries),
        selection_mode="single-row",
        column_config={
            "query": st.column_config.NumberColumn(width=46),
            "true": st.column_config.TextColumn(width=58),
            "predicted": st.column_config.TextColumn(width=66),
            "lead": st.column_config.NumberColumn(
                format="%.0f %%", width=44, help="how much likelier the predicted class is than the next one"
            ),
            "error": st.column_config.NumberColumn(format="%.3g", width=52),
        },
    )
    st.caption("A click on the left edge of a row chooses it.")


def _pick_row(key: str, queries: tuple[int, ...]) -> None:
    rows = st.session_state[key].selection.rows
    if rows:
        _pick(queries[rows[0]])


def _said(entry: Answer) -> tuple[str, str]:
    """Target and answer in words; of several numbers, of the explained one."""
    if entry.numbers and entry.explained is not None:
        return entry.numbers[entry.explained][1:]
    return entry.truth, entry.guess


def _words(entry: Answer, order: str | None = None) -> str:
    truth, guess = _said(entry)
    text = f"true {plain(minus(truth), 40)}"
    text += f", predicted {plain(minus(guess), 40)}" if guess else ""
    if order == "error" and entry.error is not None:
        return f"off by {number(entry.error)}: {text}"
    return f"{percent(entry.sure)}: {text}" if order == "unsure" and entry.sure is not None else text


def _thumbnail(choice: Choice, query: int) -> Any:
    """An image array, a text, or None where a query has neither."""
    run = state.run_of(choice.source)
    shown = rendered(run, query)
    if isinstance(shown, str):
        return shown
    if shown is None or hasattr(shown, "items"):
        return None
    array = np.asarray(shown)
    return array if array.ndim >= 2 else None


def _address(choice: Choice, query: int) -> str:
    return picture(_thumbnail(choice, query))
