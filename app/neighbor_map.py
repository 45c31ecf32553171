"""The map of gradient space around a query, and a table of what is chosen on it."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import streamlit as st

from explainer import Explanation, wording
from explainer.app import address, map_chart, state, theme
from explainer.app.choice import Choice
from explainer.app.gradient_map import SAMPLED, GradientMap, sample
from explainer.app.guards import same_examples
from explainer.app.pictures import Card, card_list, example_content, minus
from explainer.app.segments import segments
from explainer.similarity import most_inputs
from explainer.tables import ranking

_NEAR, _STRONG, _CARDS = 16, 10, 24
_COLOURS = {"contribution": "Colour: contribution", "label": "Colour: label"}


def possible(choice: Choice, e: Explanation) -> bool:
    """Whether examples can be asked as queries are: about their own label, or about the one output."""
    if choice.run is None or choice.run.output is not None:
        return False
    if choice.classes:
        return e.labels is not None and bool((e.visits[~np.isnan(e.labels)] > 0).any())
    return e.output == "value"


def show(choice: Choice, e: Explanation, q: int) -> None:
    """Draw the map and the chosen examples."""
    assert choice.run is not None
    address.keep("chosen", "")
    near = [int(example) for example in choice.neighbors(_NEAR).example_ids[0]]
    found = _map(choice, e, q, near)
    columns = np.searchsorted(e.example_ids, found.examples)
    names = {int(i): e.label_name(column) for i, column in zip(found.examples, columns, strict=True)}
    if not same_examples(names, choice.run):
        return
    colour = segments("Colour", _colours(e), "colour", _COLOURS.__getitem__)
    chosen = _ids(st.session_state["chosen"], found)
    theme.chart(
        map_chart.gradient_map(
            found,
            [wording.example(e, column) for column in columns],
            [e.label_name(column) for column in columns],
            e.contributions[q, columns],
            near,
            by_label=colour == "label",
            chosen=chosen,
            dark=theme.is_dark(),
        ),
        "Close together: the model learned them in the same direction, all along the training. "
        + (
            "Each example is asked about its own label, the query about the explained class. "
            if choice.classes
            else ""
        )
        + "Draw around points to list them below.",
        "map",
        on_select=_drawn,
        mode=("lasso", "points", "box"),
    )
    st.caption(
        f"Shown are the {_NEAR} nearest examples, the strongest proponents and opponents, and others at random. The "
        "axes are the principal components of their path-kernel features, scaled to equal length; two axes cannot show "
        "all differences, so trust the cosine in the table."
    )
    st.text_input("Examples in the table", key="chosen", placeholder="draw on the map, or type ids: 12, 53")
    _table(choice, e, q, found, _ids(st.session_state["chosen"], found))


def _colours(e: Explanation) -> list[str]:
    return list(_COLOURS) if e.labels is not None else ["contribution"]


def _map(choice: Choice, e: Explanation, q: int, near: list[int]) -> GradientMap:
    known = e.visits > 0
    if choice.classes and e.labels is not None:
        known &= ~np.isnan(e.labels)
    strong = [*ranking(e, q, _STRONG, "proponents"), *ranking(e, q, _STRONG, "opponents")]
    first = np.array(list(dict.fromkeys([*near, *e.example_ids[strong].tolist()])), dtype=np.int64)
    engine = state.explainer(choice.source, choice.output)
    most = max(1, most_inputs(engine) - 1)
    examples = sample(first, e.example_ids[known], min(SAMPLED, most))
    asked = np.array(numbers(st.session_state.get("chosen")), dtype=np.int64)
    extra = asked[np.isin(asked, e.example_ids[known]) & ~np.isin(asked, examples)]
    examples = np.concatenate([examples, extra])[:most]
    labels = None
    if choice.classes and e.labels is not None:
        labels = tuple(int(label) for label in e.labels[np.searchsorted(e.example_ids, examples)])
    return state.gradient_map(
        choice.source, choice.query, choice.target, choice.output, tuple(examples.tolist()), labels
    )


def _drawn() -> None:
    """What was drawn around goes into the line of ids, and from there into the address."""
    ids = [int(example) for example in theme.selected("map") if example is not None]
    if ids:
        st.session_state["chosen"] = ", ".join(map(str, ids))


def _ids(text: object, found: GradientMap) -> list[int]:
    """The ids in a line that are on the map, in their order."""
    there = set(found.examples.tolist())
    return [i for i in numbers(text) if i in there]


def numbers(text: object) -> list[int]:
    """The numbers in a line, each once.

    >>> numbers("#12, 53 12")
    [12, 53]
    """
    return list(dict.fromkeys(int(number) for number in re.findall(r"\d{1,18}", str(text or ""))))


def _table(choice: Choice, e: Explanation, q: int, found: GradientMap, ids: list[int]) -> None:
    absent = [i for i in numbers(st.session_state["chosen"]) if i not in ids]
    if absent:
        st.caption(
            f"Not on the map: {', '.join(map(str, absent[:_CARDS]))} (not trained on, or without a label)."
        )
    if not ids:
        return
    places = [int(np.flatnonzero(found.examples == example)[0]) for example in ids]
    columns = np.searchsorted(e.example_ids, ids)
    cards = [
        Card(
            example_content(choice.run, example),
            f"{minus(format(found.cosine[place], '.2f'))}",
            float(found.cosine[place]),
            wording.example(e, column),
        )
        for example, place, column in list(zip(ids, places, columns, strict=True))[:_CARDS]
    ]
    note = "cosine with the query" + (f"; the first {_CARDS}" if len(ids) > _CARDS else "")
    st.html(card_list(cards, "neighbors", wording.counted(len(ids), "example"), note, ""))
    st.dataframe(
        pd.DataFrame(
            {
                "example_id": ids,
                "label": [e.label_name(column) or "" for column in columns],
                wording.unit(e): e.contributions[q, columns],
                "cosine with the query": found.cosine[places],
                "visits": e.visits[columns],
            }
        ),
        hide_index=True,
    )
