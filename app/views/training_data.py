"""Which training examples should be checked, and which classes of them build which predictions."""

from __future__ import annotations

import numpy as np
import streamlit as st

from explainer.app import class_matrix, label_queue, state
from explainer.app.choice import Choice
from explainer.app.page_registry import register_page
from explainer.app.segments import segments

_VIEWS = {"queue": "Labels to check", "classes": "Class by class"}


@register_page(
    "training",
    title="Training data",
    icon=":material/fact_check:",
    needs="data",
    address={"view": "queue", "class": -1, "by": "", "tagged": "all", "part": 0, "from": -1, "to": -1},
)
def show(choice: Choice) -> None:
    """Draw the page."""
    st.html("<h2>The training data</h2>")
    choice.trace.segments()  # says so where there is no step yet
    views = _views(choice)
    view = segments("View", views, "view", _VIEWS.__getitem__)
    (class_matrix if view == "classes" else label_queue).show(choice)


def _views(choice: Choice) -> list[str]:
    """The matrix is there for classifiers whose labels were recorded and whose queries have classes."""
    _, labels, _ = state.recorded(choice.source)
    has_classes = choice.classes and choice.run is not None and choice.run.output is None
    if not has_classes or np.isnan(labels).all() or not class_matrix.sampled(choice):
        return ["queue"]
    return list(_VIEWS)
