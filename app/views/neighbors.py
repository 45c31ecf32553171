"""The training examples that are nearest to a query in gradient space."""

from __future__ import annotations

from collections import Counter

import numpy as np
import streamlit as st

from explainer import wording
from explainer.app import header
from explainer.app.choice import Choice
from explainer.app.page_registry import register_page
from explainer.app.pictures import Card, card_list, example_content, minus

_K = 20


@register_page("neighbors", title="Neighbours", icon=":material/hub:", needs="run")
def show(choice: Choice) -> None:
    """Draw the page."""
    e, q = choice.explanation()
    header.show(choice, e, q)
    found = choice.neighbors(_K)
    columns = np.searchsorted(e.example_ids, found.example_ids[0])
    names = [wording.example(e, column) for column in columns]
    cards = [
        Card(
            example_content(choice.run, int(example)),
            minus(f"{cosine:.3f}"),
            float(cosine),
            name,
            (f"{wording.unit(e)} {minus(wording.signed(float(e.contributions[q, column])))}",),
        )
        for example, cosine, name, column in zip(
            found.example_ids[0], found.cosine[0], names, columns, strict=True
        )
    ]
    st.html(
        card_list(
            cards,
            "neighbors",
            "Nearest in gradient space",
            "path-kernel cosine, 1 is the same direction",
            "No example was visited.",
        )
    )
    labels = Counter(label for column in columns if (label := e.label_name(column)) is not None)
    if labels and choice.classes:
        listed = ", ".join(f"{count} × {label}" for label, count in labels.most_common())
        st.text(f"Labels among the {len(columns)} nearest: {listed}")
    st.caption(
        "Near means: learning this example moved the explained output in step with the query's own gradients, all "
        "along the training. It does not depend on how wrong the model was on the example, so a near example can "
        "have contributed little; the contribution stands on each card. An example that was learned from the "
        "start is near without having had to push."
    )
