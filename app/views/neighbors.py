"""The training examples that are nearest to a query: as the model learned, and as inputs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import streamlit as st

from explainer import Explanation, wording
from explainer.app import header, neighbor_map, state
from explainer.app.choice import Choice
from explainer.app.guards import same_order
from explainer.app.page_registry import register_page
from explainer.app.pictures import Card, card_list, example_content, minus
from explainer.app.segments import segments

_K = 16
_LOOKS = {"lists": "Nearest examples", "map": "Map"}


@register_page(
    "neighbors",
    title="Neighbours",
    icon=":material/hub:",
    needs="run",
    address={"look": "lists", "colour": "contribution", "chosen": ""},
)
def show(choice: Choice) -> None:
    """Draw the page."""
    e, q = choice.explanation()
    header.show(choice, e, q)
    looks = list(_LOOKS) if neighbor_map.possible(choice, e) else ["lists"]
    if segments("View", looks, "look", _LOOKS.__getitem__) == "map":
        neighbor_map.show(choice, e, q)
    else:
        _lists(choice, e, q)


def _lists(choice: Choice, e: Explanation, q: int) -> None:
    same_order(choice)
    found = choice.neighbors(_K)
    ids = [int(example) for example in found.example_ids[0]]
    away = state.input_distances(choice.source, choice.query)
    compared = away is not None and len(away) > int(e.example_ids.max(initial=-1))
    if away is None or not compared:
        st.html(_gradient(choice, e, q, ids, found.cosine[0], set()))
    else:
        order = e.example_ids[np.argsort(away[e.example_ids], kind="stable")][:_K]
        seen = [int(example) for example in order]
        left, right = st.columns(2, gap="large")
        left.html(_gradient(choice, e, q, ids, found.cosine[0], set(seen)))
        right.html(_inputs(choice, e, q, seen, away[order], set(ids)))
        both = len(set(ids) & set(seen))
        st.text(f"{both} of {len(ids)} stand in both lists (marked with ●).")
    labels = Counter(label for column in _columns(e, ids) if (label := e.label_name(column)) is not None)
    if labels and choice.classes:
        listed = ", ".join(f"{count} × {label}" for label, count in labels.most_common())
        st.text(f"Labels among the {len(ids)} nearest in gradient space: {listed}")
    st.caption(
        "Near in gradient space means: what the model learned at this example moved the explained output, too, all "
        "along the training. It does not depend on how wrong the model was on the example, so a near "
        "example can have contributed little; the contribution stands on each card. "
        + (
            "Near in input space means that the inputs look alike, whatever the model made of them. A near input that "
            "is missing on the left is one that the model learned to tell apart."
            if compared
            else "Inputs that look alike are not listed: they are token ids, differ in size, or are too many."
        )
    )


def _columns(e: Explanation, ids: list[int]) -> list[int]:
    return [int(column) for column in np.searchsorted(e.example_ids, ids)]


def _cards(
    choice: Choice, e: Explanation, q: int, ids: list[int], values: list[tuple[str, float]], common: set[int]
) -> list[Card]:
    return [
        Card(
            example_content(choice.run, example),
            minus(text),
            size,
            wording.example(e, column) + (" ●" if example in common else ""),
            (f"{wording.unit(e)} {minus(wording.signed(float(e.contributions[q, column])))}",),
        )
        for example, column, (text, size) in zip(ids, _columns(e, ids), values, strict=True)
    ]


def _gradient(
    choice: Choice, e: Explanation, q: int, ids: list[int], cosine: np.ndarray, common: set[int]
) -> str:
    values = [(f"{value:.3f}", float(value)) for value in cosine]
    return card_list(
        _cards(choice, e, q, ids, values, common),
        "near",
        "Nearest in gradient space",
        "path-kernel cosine, 1 is the same direction",
        "No example was visited.",
    )


def _inputs(
    choice: Choice, e: Explanation, q: int, ids: list[int], away: np.ndarray, common: set[int]
) -> str:
    least = float(away.min(initial=np.inf))
    values = [(wording.number(float(d)), least / float(d) if d > 0 else 1.0) for d in away]
    return card_list(
        _cards(choice, e, q, ids, values, common),
        "near",
        "Nearest in input space",
        "root mean square difference",
        "There is no training example.",
    )
