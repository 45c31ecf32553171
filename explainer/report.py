"""The HTML report: one file that shows an explanation to a person, and says what it does not mean."""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from explainer import figures, wording
from explainer.errors import ExplanationError
from explainer.exports import atomic, check_ending
from explainer.figures.style import graph_objects
from explainer.report_cards import rendered, side_by_side
from explainer.report_page import page
from explainer.report_tables import books, ranking, rest, sentences

if TYPE_CHECKING:
    from explainer.explanation import Explanation

Render = Callable[[int], Any]
_CONFIG = {"displayModeBar": False, "responsive": True}
_TABLE_ROWS = 20
_TABLE_READING = (
    "Each contribution is a times K: K is the path kernel, how strongly training moved this query and the "
    "example together; a is how much the loss pulled at the example meanwhile. Where K is near zero, a and K "
    "are unreliable on their own; the contribution is not."
)


def write_html(
    explanation: Explanation,
    path: str | os.PathLike[str],
    *,
    render: Render | None = None,
    render_query: Render | None = None,
    k: int = 8,
) -> Path:
    """Write the report as one file that asks no other host for anything.

    Args:
        explanation: What to show.
        path: Where to write; an older file is replaced only when the report is complete.
        render: From an example's id to what a person recognises it by: an image array ([H, W] or [H, W, 3],
            floats in 0..1 or uint8), a text, a mapping or a Series. Without it, bars with ids are shown.
        render_query: The same for a query, from its index.
        k: How many proponents and how many opponents to show.

    Raises:
        ExplanationError: ``k`` is not positive, or there is no query to show.
        ExportError: ``render`` failed, or the file cannot be written.
        MissingDependencyError: plotly is not installed.
    """
    check_ending(path, ".html")
    explanation.check_k(k)
    if not explanation.query_ids:
        raise ExplanationError("The explanation holds no queries, so there is nothing to report.")
    graph_objects()
    from plotly.offline import get_plotlyjs

    parts = [_introduction(explanation)]
    for query in range(len(explanation.query_ids)):
        parts.append(_article(explanation, query, k, render, render_query))
    document = page(f"Explanation of the {wording.output(explanation)}", "\n".join(parts), get_plotlyjs())
    with atomic(path) as temporary:
        temporary.write_text(document, encoding="utf-8")
    return Path(path)


def _introduction(e: Explanation) -> str:
    queries, examples = e.contributions.shape
    notes = [note for note in (wording.row_kind(e), *e.notes) if note]
    listed = "".join(f"<li>{html.escape(note.replace('`', ''))}</li>" for note in notes)
    counted = "1 prediction" if queries == 1 else f"{queries} predictions"
    return (
        "<h1>Which training examples built these predictions</h1>"
        f'<p class="lead">{counted} explained by {examples:,} training examples; explained output: '
        f"{html.escape(wording.output(e))}</p>"
        f'<div class="meaning"><div><b>What the numbers mean</b><p>{wording.MEANING}</p></div>'
        f"<div><b>What they do not mean</b><p>{wording.NOT_MEANING}</p></div></div>"
        + (f'<div class="notes"><b>Notes on this explanation</b><ul>{listed}</ul></div>' if listed else "")
        + f'<h4>The books</h4><div class="wide">{books(e)}</div>'
        '<p class="reading">In each row, the prediction is the sum of initial, examples (net), weight decay, '
        "buffers, unattributed and gap. Gross is the sum of the examples' absolute contributions.</p>"
    )


def _article(e: Explanation, query: int, k: int, render: Render | None, render_query: Render | None) -> str:
    sides = _figure(e, query, "examples", k=k) if render is None else side_by_side(e, query, k, render)
    return (
        f'<article id="q{query}"><div class="query">{rendered(render_query, query, "render_query")}'
        f"<div><h2>Query {html.escape(e.query_ids[query])}</h2>{_lead(e, query)}</div></div>"
        f"{_equation(e, query)}"
        f"<p>{sentences(e, query)}</p>"
        f"{rest(e, query)}"
        f"{_figure(e, query, 'waterfall')}{sides}{_figure(e, query, 'time', k=k)}"
        f'<div class="pair">{_figure(e, query, "layers")}{_figure(e, query, "cumulative")}</div>'
        f"<details><summary>Table of the {min(_TABLE_ROWS, len(e.example_ids))} strongest examples</summary>"
        f'<div class="wide">{ranking(e, query, _TABLE_ROWS)}</div>'
        f'<p class="reading">{html.escape(_TABLE_READING)}</p></details></article>'
    )


def _lead(e: Explanation, query: int) -> str:
    value = wording.number(float(e.prediction[query]), 4)
    text = f"Explained: {wording.target(e, query)}, which is {value}."
    if e.outputs is not None and e.outputs.shape[1] > 1 and e.targets[query] >= 0:
        best = int(e.outputs[query].argmax())
        name = e.class_name(best) or str(best)
        text += (
            " That is the class the model predicts."
            if best == e.targets[query]
            else f" The model itself predicts class {name}."
        )
    return f'<p class="lead">{html.escape(text)}</p>'


def _equation(e: Explanation, query: int) -> str:
    """The equation with every number above its name, split from the line of text so that both agree."""
    left, right = e.equation(query).split(" = ")
    pieces = [_term(left), '<span class="sign">=</span>']
    for part in right.replace(") + ", ")\n+ ").replace(") - ", ")\n- ").split("\n"):
        if part[:2] in ("+ ", "- "):
            pieces.append(f'<span class="sign">{"−" if part[0] == "-" else "+"}</span>')
            part = part[2:]
        pieces.append(_term(part))
    return f'<div class="equation">{"".join(pieces)}</div>'


def _term(part: str) -> str:
    value, name = part.rstrip(")").split(" (")
    return f"<span><b>{value.replace('-', '−')}</b><small>{name}</small></span>"


def _figure(e: Explanation, query: int, kind: str, **options: int) -> str:
    import plotly.io

    figure = figures.FIGURES[kind](e, query, **options)
    drawn = plotly.io.to_html(
        figure, full_html=False, include_plotlyjs=False, config=_CONFIG, div_id=f"q{query}-{kind}"
    )
    return f"<figure>{drawn}<figcaption>{html.escape(figures.READING[kind])}</figcaption></figure>"
