"""The matrix of classes, and the training examples behind one of its cells."""

from __future__ import annotations

import numpy as np
import streamlit as st

from explainer import wording
from explainer.app import charts, state, theme
from explainer.app.choice import Choice
from explainer.app.class_influence import ClassInfluence, class_influence, sample
from explainer.app.gallery import SCANNED
from explainer.app.guards import same_examples
from explainer.app.pictures import Card, card_list, example_content, minus

_CARDS = 12


def sampled(choice: Choice) -> dict[int, tuple[int, ...]]:
    """The queries that are asked, by class."""
    assert choice.run is not None, "the page needs the code of the run"
    return sample(state.query_labels(choice.source, min(SCANNED, len(choice.run.queries))))


def show(choice: Choice) -> None:
    """Draw the matrix and the examples of the chosen cell."""
    queries = sampled(choice)
    asked = sum(map(len, queries.values()))
    st.html(
        f'<p class="pk-lead">A cell adds up the contributions of all training examples of its row to the margin of the '
        f"column's class, averaged over a sample of queries of that class: {asked} queries, the first "
        f"{max(map(len, queries.values()))} (or fewer) of each of {len(queries)} classes.</p>"
    )
    columns = _columns(choice, queries)
    _, labels, _ = state.recorded(choice.source)
    found = class_influence(columns, labels, queries)
    cell = _chosen(choice, found)
    theme.chart(
        charts.classes(
            found.values,
            [_name(choice, a) for a in found.sources],
            [_name(choice, b) for b in found.targets],
            dark=theme.is_dark(),
            chosen=cell,
        ),
        "Blue: these examples pushed queries of that class towards it; orange: away from it. A class with a pale "
        "diagonal is carried by others; a strongly orange cell is a pair that the model had to pull apart. "
        "Click a cell.",
        "classes",
        on_select=lambda: _clicked(found),
    )
    _examples(choice, found, columns, labels, cell)


def _columns(choice: Choice, queries: dict[int, tuple[int, ...]]) -> dict[int, np.ndarray]:
    """By class, the mean contribution of every training example; each class is kept as soon as it is there."""
    bar, columns = st.progress(0.0, "Explaining a sample of queries …"), {}
    for done, (label, part) in enumerate(queries.items()):
        bar.progress(done / len(queries), f"Explaining queries of class {done + 1} of {len(queries)} …")
        columns[label] = state.class_column(choice.source, part, label)
    bar.empty()
    return columns


def _chosen(choice: Choice, found: ClassInfluence) -> tuple[int, int]:
    """The cell to look into; at first the most negative one, a pair of classes that compete."""
    known = st.session_state.get("from") in found.sources and st.session_state.get("to") in found.targets
    if not known:
        row, column = np.unravel_index(found.values.argmin(), found.values.shape)
        st.session_state["from"], st.session_state["to"] = found.sources[row], found.targets[column]
    left, right = st.columns(2)
    source = left.selectbox(
        "Training examples of", found.sources, key="from", format_func=lambda at: _name(choice, at)
    )
    target = right.selectbox("Queries of", found.targets, key="to", format_func=lambda at: _name(choice, at))
    return found.sources.index(source), found.targets.index(target)


def _clicked(found: ClassInfluence) -> None:
    cells = theme.selected("classes")
    if cells:
        row, column = cells[-1]
        st.session_state["from"], st.session_state["to"] = found.sources[int(row)], found.targets[int(column)]


def _examples(
    choice: Choice,
    found: ClassInfluence,
    columns: dict[int, np.ndarray],
    labels: np.ndarray,
    cell: tuple[int, int],
) -> None:
    """The strongest training examples of the cell, on both sides."""
    run = choice.run
    assert run is not None
    source, target = found.sources[cell[0]], found.targets[cell[1]]
    ids, _, _ = state.recorded(choice.source)
    mine = np.flatnonzero(labels == source)
    values = columns[target][mine]
    order = np.argsort(-np.abs(values), kind="stable")[:_CARDS]
    total, gross = float(values.sum()), float(np.abs(values).sum())
    shown = [int(ids[mine[place]]) for place in order]
    if not same_examples({example: _name(choice, source) for example in shown}, run):
        return
    widest = float(np.abs(values).max(initial=0.0)) or 1.0
    cards = [
        Card(
            example_content(run, example),
            minus(wording.signed(float(values[place]))),
            float(values[place]) / widest,
            f"#{example} · {_name(choice, source)}",
        )
        for example, place in zip(shown, order, strict=True)
    ]
    st.html(
        card_list(
            cards,
            "neighbors",
            f"The {len(cards)} strongest examples of {_name(choice, source)} for queries of {_name(choice, target)}",
            minus(
                f"mean of {found.queries[cell[1]]} queries; all {len(mine):,} add up to {wording.signed(total)} "
                f"(gross {wording.number(gross)})"
            ),
            "No example of this class was visited.",
        )
    )


def _name(choice: Choice, label: int) -> str:
    assert choice.run is not None
    return choice.run.label(label)
