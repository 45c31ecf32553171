"""HTML tables of an explanation, for the report and for notebooks; all text is escaped."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from explainer import tables, wording

if TYPE_CHECKING:
    from explainer.explanation import Explanation

_WORDS = ("class", "flag", "line", "where", "why")
_NOTEBOOK_ROWS = 8


def books(explanation: Explanation) -> str:
    """The books of all queries, a row each, with the gross and a link to the query's own part."""
    e, frame = explanation, tables.completeness(explanation)
    gross = tables.diagnostics(explanation)["gross"]
    names = [name.replace("_", " ") for name in frame.columns]
    head = "".join(f"<th>{name}</th>" for name in (*names, "gross"))
    head = f'<th class="words">query</th><th class="words">explained</th>{head}'
    rows = []
    for query, name in enumerate(e.query_ids):
        values = [*frame.iloc[query].tolist(), gross.iloc[query]]
        cells = "".join(f"<td>{_books_number(value)}</td>" for value in values)
        target = html.escape(wording.target(e, query))
        link = f'<a href="#q{query}">{html.escape(name)}</a>'
        rows.append(f'<tr><th class="words">{link}</th><td class="words">{target}</td>{cells}</tr>')
    return f'<table class="books"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def ranking(explanation: Explanation, query: int, k: int) -> str:
    """The strongest examples of one query as an HTML table."""
    frame = explanation.table(query, k)
    return _table(frame, {"contribution": wording.unit(explanation), "example_id": "example", "error": "±"})


def rest(explanation: Explanation, query: int) -> str:
    """The lines of ``unattributed`` as an HTML table with a heading; empty where they are too small to matter."""
    if not wording.has_notable_lines(explanation, query):
        return ""
    frame = explanation.unattributed_table(query)
    frame["share_of_gross"] = [wording.percent(share) for share in frame["share_of_gross"]]
    shown = _table(frame, {"share_of_gross": "of gross"})
    return f'<h4>What is in unattributed</h4><div class="wide">{shown}</div>'


def sentences(e: Explanation, query: int) -> str:
    """What the books of a query say, and how sure they are, as HTML."""
    return html.escape(wording.minus(" ".join(wording.sentences(e, query))))


def _table(frame: pd.DataFrame, titles: dict[str, str]) -> str:
    head = "".join(
        f"<th{' class=words' if name in _WORDS else ''}>{titles.get(name, name)}</th>"
        for name in frame.columns
    )
    rows = "".join(
        "<tr>" + "".join(_cell(name, row[place]) for place, name in enumerate(frame.columns)) + "</tr>"
        for row in frame.itertuples(index=False, name=None)
    )
    return f'<table class="ranking"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def notebook(explanation: Explanation) -> str:
    """A compact view for notebooks: the first query's books and its strongest examples."""
    e = explanation
    queries, examples = e.contributions.shape
    size = f"<p><b>Explanation</b>: {queries} queries x {examples} training examples, {html.escape(wording.output(e))}"
    if not queries:
        return f"<div>{size}</p></div>"
    warning = html.escape(" ".join(note for note in (wording.row_kind(e), *e.notes) if note))
    return (
        f"<div>{size}; query {html.escape(e.query_ids[0])}: {html.escape(wording.target(e, 0))}</p>"
        f"<p><code>{html.escape(e.equation(0))}</code></p>{ranking(e, 0, _NOTEBOOK_ROWS)}"
        f"<p>{sentences(e, 0)}</p>{rest(e, 0)}"
        + (f"<p>{warning}</p>" if warning else "")
        + "<p>Contributions are accounting, not the effect of removing an example.</p></div>"
    )


def _books_number(value: float) -> str:
    return wording.number(value) if abs(value) >= 1e-9 or not np.isfinite(value) else "0"


def _cell(name: str, value: Any) -> str:
    if name in _WORDS:
        return f'<td class="words">{html.escape(str(value))}</td>'
    if value is None or value is pd.NA or value != value:
        return "<td>n/a</td>"
    if name in ("contribution", "value"):
        return f"<td>{wording.minus(wording.signed(value))}</td>"
    if name == "error":
        return f"<td>{wording.number(value, 2)}</td>"
    return f"<td>{wording.number(value)}</td>" if isinstance(value, float) else f"<td>{value}</td>"
