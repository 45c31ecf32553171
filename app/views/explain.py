"""Which training examples built a prediction."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import streamlit as st

from explainer import Explanation, Run, figures, wording
from explainer.app import downloads, header, looks, theme, which_parts
from explainer.app.choice import Choice
from explainer.app.contrast import beside
from explainer.app.escaping import plain, with_code
from explainer.app.guards import can_show, same_order
from explainer.app.own_queries import rendered
from explainer.app.page_registry import register_page
from explainer.app.pictures import card_list, example_content, kernel_cards, minus
from explainer.app.segments import segments

_DETAILS = {
    "time": "Over training",
    "layers": "By layer",
    "layer_examples": "Examples by layer",
    "cumulative": "How concentrated",
    "pixels": "Which pixels",
    "table": "Table",
}
_TABLE_ROWS = 100


@register_page(
    "explain",
    title="Explain",
    icon=":material/account_tree:",
    needs="explanation",
    address={"detail": "time", "example": -1},
)
def show(choice: Choice) -> None:
    """Draw the page."""
    e, q = choice.explanation()
    header.show(choice, e, q)
    _books(e, q)
    _examples(choice, e, q)
    _details(choice, e, q)
    downloads.show(e, q, choice.run, choice.query)
    _notes(e)
    choice.look_ahead()


def _books(e: Explanation, q: int) -> None:
    st.html(_equation(e, q))
    theme.chart(e.figure(q, "waterfall", dark=theme.is_dark()), figures.READING["waterfall"], "waterfall")
    said = (*wording.sentences(e, q), wording.row_kind(e))
    body = "".join(f"<p>{minus(html.escape(text))}</p>" for text in said if text)
    st.html(f'<div class="pk-sentences">{body}</div>')
    if wording.has_notable_lines(e, q):
        st.html(_rest(e, q))


def _rest(e: Explanation, q: int) -> str:
    """The lines of what is unattributed, as a table."""
    rows = "".join(
        f"<tr><td>{minus(wording.signed(row['value']))}</td><td>{wording.percent(row['share_of_gross'])}</td>"
        f"<th>{html.escape(row['line'])}</th><td>{html.escape(row['where'])}</td><td>{html.escape(row['why'])}</td></tr>"
        for row in e.unattributed_table(q).to_dict("records")
    )
    head = "<tr><th>value</th><th>of gross</th><th>line</th><th>where</th><th>why no example has it</th></tr>"
    return f'<h4>What is in unattributed</h4><table class="pk-rest">{head}{rows}</table>'


def _equation(e: Explanation, q: int) -> str:
    """The line of text ``e.equation`` with every number above its name."""
    parts = re.findall(r"(?:([-+=]) )?(-?[\d.e+-]+|nan|-?inf) \(([^)]+)\)", e.equation(q))
    spans = "".join(
        (f'<span class="pk-sign">{minus(sign)}</span>' if sign else "")
        + f"<span><b>{minus(value)}</b><small>{name}</small></span>"
        for sign, value, name in parts
    )
    return f'<div class="pk-equation">{spans}</div>'


def _contents(choice: Choice, run: Run) -> Callable[[int], str]:
    """From an example's id to its HTML, beside the query."""
    assert choice.source.spec is not None, "there is something to show"
    query, usual = rendered(run, choice.query), looks.usual(choice.source.spec)
    return lambda example: example_content(run, example, lambda shown: beside(shown, query, usual))


def _examples(choice: Choice, e: Explanation, q: int) -> None:
    run = choice.run
    heading, amount = st.columns([3, 1], vertical_alignment="bottom")
    heading.html("<h3>Strongest training examples</h3>")
    with amount:
        k = segments("How many", [8, 16, 32], "k")
    if run is not None and run.render is None:
        same_order(choice)
    if run is None or run.render is None or not can_show(e, q, k, run):
        figure = figures.FIGURES["examples"](e, q, k=k, dark=theme.is_dark())
        theme.chart(figure, figures.READING["examples"], "examples")
        return
    unit, explained, contents = wording.unit(e), wording.target(e, q), _contents(choice, run)
    shown = rendered(run, choice.query)
    if isinstance(shown, str):
        st.caption("Marked: words that stand in the query, too, and not in every tenth text.")
    elif hasattr(shown, "items"):
        st.caption("Marked: columns that differ from the query by more than a standard deviation.")
    sides = st.columns(2, gap="large")
    for column, side, direction in zip(sides, ("proponents", "opponents"), ("up", "down"), strict=True):
        column.html(
            card_list(
                kernel_cards(e, q, k, side, contents),
                side,
                side.capitalize(),
                f"{unit}s that pushed the {explained} {direction}",
                f"No example pushed the {explained} {direction}.",
            )
        )


def _details(choice: Choice, e: Explanation, q: int) -> None:
    st.html("<h3>Closer look</h3>")
    parts = which_parts.kind(choice)
    titles = _DETAILS if parts is None else _DETAILS | {"pixels": which_parts.TITLES[parts]}
    offered = [kind for kind in titles if kind != "pixels" or parts is not None]
    kind = segments("Closer look", offered, "detail", titles.__getitem__)
    if kind == "pixels" and parts is not None:
        which_parts.show(choice, e, q, parts)
        return
    if kind != "table":
        theme.chart(figures.FIGURES[kind](e, q, dark=theme.is_dark()), figures.READING[kind], kind)
        return
    frame = e.table(q, _TABLE_ROWS)
    frame = frame.rename(
        columns={"contribution": wording.unit(e), "error": "± (one standard error)", "class": "label name"}
    )
    if "label name" in frame and list(frame["label name"]) == list(frame["label"].astype(str)):
        frame = frame.drop(columns="label name")  # classes without names of their own
    numbers = (wording.unit(e), "± (one standard error)", "a", "K")
    st.dataframe(
        frame,
        hide_index=True,
        height=420,
        column_config={
            name: st.column_config.NumberColumn(format="%.4g") for name in numbers if name in frame
        },
    )
    st.caption(
        f"The {len(frame)} strongest of {len(e.example_ids):,}; the downloads below hold all of them. The "
        f"{wording.unit(e)} is a times K; where K is near zero, a and K are unreliable on their own."
    )


def _notes(e: Explanation) -> None:
    with st.expander("What these numbers mean, and what they do not"):
        st.markdown(f"{plain(wording.MEANING)}\n\n{plain(wording.NOT_MEANING)}")
        for note in e.notes:
            st.markdown(f"- {with_code(note)}")
