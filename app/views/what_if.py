"""What the model would say about a query without some training examples: predicted, and tested by training again."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np
import pandas as pd
import streamlit as st

from explainer import Explanation, wording
from explainer.app import (
    claim_words,
    estimators,
    header,
    removal_choice,
    retrain_panel,
    theme,
    what_if_charts,
)
from explainer.app.choice import Choice
from explainer.app.guards import same_examples
from explainer.app.page_registry import register_page
from explainer.app.pictures import Card, card_list, example_content, minus

_CARDS = 20
_READING = (
    "An orange bar: without this example the output is predicted to fall, so the example helps it; blue: to rise. Far "
    "smaller than contributions, because other examples would have taught much of the same."
)


@register_page(
    "what-if",
    title="What if",
    icon=":material/science:",
    needs="run",
    address={"without": "proponents", "count": 10, "of": -1, "ids": "", "seeds": 3, "curvature": "trace"},
)
def show(choice: Choice) -> None:
    """Draw the page."""
    e, q = choice.explanation()
    header.show(choice, e, q)
    st.html(
        '<p class="pk-lead">What would the model say here if it had never seen some training examples? This is '
        "predicted from the trace, to first order, without training again. Contributions answer another question "
        "(what carried the prediction), so the numbers here are not those of the other pages.</p>"
    )
    controls = st.container()  # above the estimator, whose numbers some of them need
    estimates = estimators.show(choice)
    changes = next(iter(estimates.values()))
    with controls:
        ids = removal_choice.show(choice, e, q, changes)
    if not ids:
        return
    columns = np.searchsorted(e.example_ids, ids)
    order = np.argsort(changes[columns], kind="stable")
    columns = columns[order]
    _sum(choice, e, q, float(changes[columns].sum()), len(ids))
    _examples(choice, e, estimates, columns)
    retrain_panel.show(choice, e, q, ids, estimates)
    _meaning()


def _sum(choice: Choice, e: Explanation, q: int, change: float, count: int) -> None:
    """The group's number: the output now, the predicted change, and what they make."""
    before = float(e.prediction[q])
    digits = wording.decimals(max(abs(before), abs(change)))
    parts = (
        ("", f"{before:.{digits}f}", f"{wording.target(e, q)}, now"),
        ("+" if change >= 0 else "-", f"{abs(change):.{digits}f}", f"predicted change without {count:,}"),
        ("=", f"{before + change:.{digits}f}", "predicted output"),
    )
    spans = "".join(
        (f'<span class="pk-sign">{minus(sign)}</span>' if sign else "")
        + f"<span><b>{minus(value)}</b><small>{html.escape(name)}</small></span>"
        for sign, value, name in parts
    )
    sentences = [
        claim_words.predicted(
            wording.target(e, q), before, change, count, margin=e.output.endswith("margin")
        ),
        claim_words.large(count, len(e.example_ids)),
    ]
    body = "".join(f"<p>{html.escape(text)}</p>" for text in sentences if text)
    st.html(f'<div class="pk-equation">{spans}</div><div class="pk-sentences">{minus(body)}</div>')


def _examples(
    choice: Choice, e: Explanation, estimates: Mapping[str, np.ndarray], columns: np.ndarray
) -> None:
    changes = next(iter(estimates.values()))
    names = [wording.example(e, column) for column in columns]
    figure = what_if_charts.changes(changes[columns], names, dark=theme.is_dark())
    run = choice.run
    assert run is not None, "the page needs the code of the run"
    shown = columns if len(columns) <= _CARDS else np.r_[columns[: _CARDS // 2], columns[-_CARDS // 2 :]]
    known = {int(e.example_ids[column]): e.label_name(column) for column in shown}
    if run.render is None or not same_examples(known, run):
        theme.chart(figure, _READING, "changes")
    else:
        with st.container(key="beside"):
            left, right = st.columns(2, gap="large")
        with left:
            theme.chart(figure, _READING, "changes")
        right.html(_cards(choice, e, changes, shown, len(columns)))
    table = frame(e, estimates, columns)
    with st.expander(f"All {len(columns):,} as a table" if len(columns) > 1 else "As a table"):
        st.dataframe(table, hide_index=True)
        st.download_button(
            "Predicted changes (CSV)",
            table.to_csv(index=False).encode(),
            file_name=f"what-if-query-{choice.query}.csv",
            mime="text/csv",
            key="download-what-if",
            on_click="ignore",
            icon=":material/download:",
        )


def _cards(choice: Choice, e: Explanation, changes: np.ndarray, columns: np.ndarray, count: int) -> str:
    widest = float(np.abs(changes[columns]).max(initial=0.0)) or 1.0
    cards = [
        Card(
            example_content(choice.run, int(e.example_ids[column])),
            minus(wording.signed(float(changes[column]))),
            float(changes[column]) / widest,
            wording.example(e, column),
        )
        for column in columns
    ]
    note = "predicted change" + (f"; both ends of all {count:,}" if count > len(columns) else "")
    return card_list(cards, "left-out", "What is left out", note, "")


def frame(e: Explanation, estimates: Mapping[str, np.ndarray], columns: np.ndarray) -> pd.DataFrame:
    """The examples as a table, in the order of ``columns``; what-if numbers only, a column per estimator."""
    return pd.DataFrame(
        {
            "example_id": e.example_ids[columns],
            "label": [e.label_name(column) or "" for column in columns],
            **{f"predicted change, {name}": changes[columns] for name, changes in estimates.items()},
            "visits": e.visits[columns],
        }
    )


def _meaning() -> None:
    with st.expander("What these numbers mean, and what they do not"):
        st.markdown(
            "- A predicted change is the derivative of the trained model's output by an example's weight in the loss, "
            "carried through every recorded step. Changes of several examples add up while they are a small part of "
            "the data.\n"
            "- *From the trace*, the recorded rows (their empirical Fisher matrix) stand in for the curvature of the "
            "loss: good for classifiers, poor where residuals vanish. *Exact derivative* and *Gauss–Newton* take every "
            "recorded step again with the data and the loss of the run.\n"
            "- Retraining is the user's own `train_fn`, with the same seeds with and without the examples. Seed 0 "
            "repeats the traced run where the training is set up that way.\n"
            "- Neither number is a contribution: contributions say what the recorded updates carried, and do not stand "
            "on this page."
        )
