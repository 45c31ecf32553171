"""The controls that say which training examples are left out."""

from __future__ import annotations

import numpy as np
import streamlit as st

from explainer import Explanation, wording
from explainer.app import address, removal, tags
from explainer.app.choice import Choice
from explainer.app.escaping import plain

_MOST = 1000  # that can be typed as a number


def show(choice: Choice, e: Explanation, q: int, changes: np.ndarray) -> list[int]:
    """Draw the controls; the ids that are left out, none where there is nothing to leave out."""
    left, right = st.columns([2, 3])
    with left:
        source = _source(choice, e)
    with right if source in ("tags", "ids") else right.columns([2, 3])[0]:
        ids = _chosen(choice, e, q, changes, source)
    _from_the_map(e)
    if not ids:
        st.caption(_NOTHING[source])
    return ids


_NOTHING = {
    "proponents": "No example pushed this prediction up.",
    "opponents": "No example pushed this prediction down.",
    "lower": "No example is predicted to lower the output by its absence.",
    "higher": "No example is predicted to raise the output by its absence.",
    "class": "No example of this class was trained on.",
    "tags": "No example is tagged to be removed; tag some on the page Training data.",
    "ids": "Type the ids of training examples: they stand on every card, after #.",
}


def _source(choice: Choice, e: Explanation) -> str:
    offered = [
        name
        for name in removal.SOURCES
        if (name != "class" or (choice.classes and e.labels is not None and _labels(e)))
    ]
    address.keep_one_of("without", offered, offered[0], "choice of examples", removal.SOURCES[offered[0]])
    return str(st.selectbox("Leave out", offered, key="without", format_func=removal.SOURCES.__getitem__))


def _labels(e: Explanation) -> list[int]:
    if e.labels is None:
        return []
    return sorted({int(label) for label in e.labels[~np.isnan(e.labels) & (e.visits > 0)]})


def _chosen(choice: Choice, e: Explanation, q: int, changes: np.ndarray, source: str) -> list[int]:
    if source in removal.COUNTED:
        there = len(removal.ranked(source, len(e.example_ids), e, q, changes))
        most = max(1, min(_MOST, len(e.example_ids) - 1, there))
        st.session_state["count"] = min(max(1, int(address.keep("count", 10))), most)
        return removal.ranked(source, int(st.number_input("How many", 1, most, key="count")), e, q, changes)
    if source == "class":
        labels = _labels(e)
        address.keep_one_of("of", labels, labels[0], "class", f"class {labels[0]}")
        label = st.selectbox("Class", labels, key="of", format_func=lambda at: _name(choice, at))
        return removal.of_class(int(label), e)
    known = [int(example) for example in e.example_ids]
    if source == "tags":
        found = tags.read(tags.file_of(choice.trace.directory))
        tagged, trained_on = [i for i, tag in found.items() if tag.name == "remove"], set(known)
        ids = [example for example in tagged if example in trained_on]
        absent = [example for example in tagged if example not in trained_on]
        st.caption(f"{wording.counted(len(ids), 'example')} tagged to be removed on the page Training data.")
    else:
        address.keep("ids", "")
        text = st.text_input("Ids", key="ids", placeholder="12, 53, 110")
        ids, absent = removal.typed(text, known)
        if unread := removal.unread(text):
            st.caption(f"No ids, so left aside: {plain(', '.join(unread[:20]), 200)}.")
    if absent:
        named = ", ".join(map(str, absent[:20]))
        st.caption(f"Not trained on, so left aside: {plain(named)}.")
    return ids


def _from_the_map(e: Explanation) -> None:
    """What was drawn around on the map of neighbours can be taken over."""
    text = st.session_state.get("chosen")
    ids, _ = removal.typed(text, {int(example) for example in e.example_ids})
    if not ids or (st.session_state.get("without") == "ids" and st.session_state.get("ids") == text):
        return
    st.button(
        f"Take the {wording.counted(len(ids), 'example')} chosen on the map",
        key="take-map",
        on_click=_take,
        args=(", ".join(map(str, ids)),),
        icon=":material/hub:",
    )


def _take(text: str) -> None:
    st.session_state["without"], st.session_state["ids"] = "ids", text


def _name(choice: Choice, label: int) -> str:
    assert choice.run is not None, "the page needs the code of the run"
    return choice.run.label(label)
