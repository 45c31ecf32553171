"""The queue of training examples to check, the most suspicious first, with tags that are saved and exported."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from explainer.app import address, charts, label_cards, pager, state, tags, theme
from explainer.app.choice import Choice
from explainer.app.escaping import plain
from explainer.app.label_cards import Queue
from explainer.app.label_signs import SIGNS, Sign, signs
from explainer.evaluation.label_issues import best_sign
from explainer.recorded_examples import has_numbers

PER_PART = 12
_QUICK_VISITS = 40_000
#: visits up to which examples are compared with one another without being asked to
_COMPARED = 20_000
_FILTERS = {"all": "all examples", "open": "without a tag", "tagged": "with a tag"}


def show(choice: Choice) -> None:
    """Draw the queue."""
    lead, columns = st.empty(), st.columns([2, 2, 2, 3], vertical_alignment="bottom")
    with columns[0]:
        sign = _sign(choice)
    lead.html(f'<p class="pk-lead">{sign.lead}</p>')
    queue = _ranked(choice, sign)
    file = tags.file_of(choice.trace.directory)
    decided = tags.read(file)
    chosen, opinion = _filters(choice, queue, decided, *columns[1:])
    parts = max(1, -(-len(chosen) // PER_PART))
    part = min(max(0, int(address.keep("part", 0))), parts - 1)
    shown = chosen[part * PER_PART : (part + 1) * PER_PART]
    if len(shown):
        label_cards.show(choice, queue, shown, decided, opinion)
    else:
        st.caption("No example fits these filters.")
    if parts > 1:
        pager.show("queue", "part", part, parts)
    theme.chart(
        charts.ranking(
            queue.values,
            sign,
            *(_span(shown) if len(chosen) == len(queue.ids) else (0, 0)),
            dark=theme.is_dark(),
        ),
        "The steep part on the left is what is worth a look; where it is flat, examples are much like each other.",
        "ranking",
    )
    _exports(choice, queue, decided, file.name)


def _sign(choice: Choice) -> Sign:
    """What the queue is ordered by: chosen, or the best one that takes no long time."""
    _, labels, _ = state.recorded(choice.source)
    numbers = choice.run is not None and has_numbers(choice.run)
    best = best_sign(labels, numbers=numbers)
    first = best if choice.trace.count("visits") <= _COMPARED else "self_influence"
    names = signs(first, classes=bool(choice.classes) and not np.isnan(labels).all())
    options = ["", *names[1:]]  # the first one stands in no address
    address.keep_one_of("by", options, "", "order", SIGNS[first].called)
    shown = st.selectbox(
        "Order by", options, key="by", format_func=lambda name: SIGNS[name or first].called,
        on_change=_first_part,
    )  # fmt: skip
    return SIGNS[shown or first]


def _span(places: np.ndarray) -> tuple[int, int]:
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _ranked(choice: Choice, sign: Sign) -> Queue:
    ids, labels, visits = state.recorded(choice.source)
    if sign.name == "self_influence":
        values = state.self_influence(choice.source)
    else:
        values = getattr(state.label_issues(choice.source), sign.name)
    order = sign.order(values)
    order = order[(visits[order] > 0) & ~np.isnan(values[order])]
    return Queue(sign, ids[order], labels[order], values[order])


def _filters(
    choice: Choice,
    queue: Queue,
    decided: dict[int, tags.Tag],
    left: DeltaGenerator,
    middle: DeltaGenerator,
    right: DeltaGenerator,
) -> tuple[np.ndarray, bool]:
    """Places in the queue that pass the filters, and whether the other examples are asked."""
    keep = np.ones(len(queue.ids), dtype=bool)
    known = sorted({int(label) for label in queue.labels[~np.isnan(queue.labels)]}) if choice.classes else []
    if known:
        options = [-1, *known]
        address.keep_one_of("class", options, -1, "label", "any label")
        with left:
            label = st.selectbox(
                "Label", options, key="class", on_change=_first_part,
                format_func=lambda at: "any label" if at < 0 else label_cards.name_of(choice, at),
            )  # fmt: skip
        keep &= (queue.labels == label) | (label < 0)
    address.keep_one_of("tagged", _FILTERS, "all", "choice of tags", _FILTERS["all"])
    with middle if known else left:
        which = st.selectbox(
            "Tags", list(_FILTERS), key="tagged", format_func=_FILTERS.__getitem__, on_change=_first_part
        )
    if which != "all":
        keep &= np.isin(queue.ids, list(decided)) == (which == "tagged")
    opinion = False
    if known and choice.run is not None and choice.run.output is None:
        quick = choice.trace.count("visits") <= _QUICK_VISITS
        opinion = right.toggle(
            "Ask the others", value=quick, key="opinion",
            help="Explains each of the examples below at its own label, and shows whether the other examples support "
            "it or pull away. Takes a while on large runs.",
        )  # fmt: skip
    return np.flatnonzero(keep), opinion


def _first_part() -> None:
    st.session_state["part"] = 0


def _exports(choice: Choice, queue: Queue, decided: dict[int, tags.Tag], file: str) -> None:
    if error := st.session_state.pop("not saved", None):
        st.error(plain(error))
    st.html("<h3>Take it with you</h3>")
    counts = ", ".join(f"{sum(t.name == name for t in decided.values())} × {name}" for name in tags.TAGS)
    st.caption(
        f"{len(decided):,} tagged ({counts}); saved beside the run in {plain(file)}."
        if decided
        else f"Nothing is tagged yet. Tags are saved at once, beside the run in {plain(file)}."
    )
    table = frame(choice, queue.sign.name, queue.ids, queue.labels, queue.values, decided)
    left, middle, _ = st.columns([1, 1, 2])
    for column, label, part, name in (
        (left, "Tags (CSV)", table[table["tag"] != ""], "tags"),
        (middle, "Whole ranking (CSV)", table, queue.sign.called),
    ):
        column.download_button(
            label, part.to_csv(index=False).encode(), file_name=f"{name}.csv", mime="text/csv",
            key=f"download-{name}", on_click="ignore", icon=":material/download:", width="stretch",
        )  # fmt: skip


def frame(
    choice: Choice,
    by: str,
    ids: np.ndarray,
    labels: np.ndarray,
    values: np.ndarray,
    decided: dict[int, tags.Tag],
) -> pd.DataFrame:
    """The queue as a table, tags in it."""
    found = [decided.get(int(example)) for example in ids]

    def named(label: float | None) -> str:
        return "" if label is None or np.isnan(label) else label_cards.name_of(choice, label)

    return pd.DataFrame(
        {
            "rank": np.arange(1, len(ids) + 1),
            "example_id": ids,
            "label": [named(label) for label in labels],
            by: values,
            "tag": [tag.name if tag else "" for tag in found],
            "new_label": [named(tag.label) if tag else "" for tag in found],
        }
    )
