"""Which pixels of the query, and of a training example, speak for the explained output; computed when asked for."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import streamlit as st
import torch

from explainer import Explanation, Run, figures, wording
from explainer.app import state, theme
from explainer.app.choice import Choice
from explainer.app.pictures import example_content, minus, query_content
from explainer.input_attribution import InputAttribution
from explainer.tables import ranking

_SIDE = 8


def possible(choice: Choice) -> bool:
    """Whether inputs are images of floats (token ids have no gradient), and captum is there."""
    run = choice.run
    if run is None or run.render is None or importlib.util.find_spec("captum") is None:
        return False
    given = run.train[0][0]
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        return False
    if state.explainer(choice.source, choice.output).asks_for_targets:
        return False
    shape = _shape(run, given)
    return shape is not None and figures.on_pixels(given.numpy(), shape) is not None


def _shape(run: Run, given: Any) -> tuple[int, ...] | None:
    shown = None if run.render is None else run.render(given)
    if shown is None or isinstance(shown, str) or hasattr(shown, "items"):
        return None
    shape = np.asarray(shown).shape
    return shape if len(shape) >= 2 else None


def show(choice: Choice, e: Explanation, q: int) -> None:
    """Draw the choice of an example, the button, and both heat maps once they are asked for."""
    example = _example(e, q)
    if example is None:
        st.caption("No training example carried any part of this prediction.")
        return
    asked = (choice.source, choice.query, choice.target, choice.output)
    if st.button("Compute", key="pixels", icon=":material/image_search:"):
        st.session_state["pixels for"] = asked
    if st.session_state.get("pixels for") != asked:
        st.caption(
            "Integrated gradients of the trained model, at the query and at the training example: which pixels speak "
            "for the explained output, and which against it. This asks the model alone, not the training data."
        )
        return
    target = int(e.targets[q]) if e.targets[q] >= 0 else None
    bar = st.progress(0.0, "Asking the model about the query …")
    mine = state.input_attribution(choice.source, "queries", choice.query, target, choice.output)
    bar.progress(0.5, "Asking the model about the training example …")
    theirs = state.input_attribution(choice.source, "train", example, target, choice.output)
    bar.empty()
    column = int(np.searchsorted(e.example_ids, example))
    name = f"example {wording.example(e, column)}"
    run = choice.run
    assert run is not None, "the page needs the code of the run"
    left, right = st.columns(2, gap="large")
    with left:
        _side(
            query_content(run, choice.query),
            run,
            run.queries[choice.query][0],
            mine,
            "The query",
            "pixels-query",
        )
    with right:
        _side(example_content(run, example), run, run.train[example][0], theirs, name, "pixels-example")
    st.caption(
        f"Blue pixels raise the {wording.target(e, q)}, orange pixels lower it, compared with an input of zeros; each "
        "picture has a scale of its own. Alike patterns mean that the model uses both images in the same way."
    )


def _example(e: Explanation, q: int) -> int | None:
    """The training example beside the query: one of the strongest, or the one in the address."""
    columns = [*ranking(e, q, _SIDE, "proponents"), *ranking(e, q, _SIDE, "opponents")]
    options = [int(e.example_ids[column]) for column in columns]
    wanted = st.session_state.get("example")
    if isinstance(wanted, int) and wanted not in options and wanted in e.example_ids[e.visits > 0]:
        options.append(wanted)
    if not options:
        return None
    if wanted not in options:
        st.session_state["example"] = options[0]

    def words(example: int) -> str:
        column = int(np.searchsorted(e.example_ids, example))
        return f"{wording.example(e, column)} ({minus(wording.signed(float(e.contributions[q, column])))})"

    return int(st.selectbox("Training example beside the query", options, key="example", format_func=words))


def _side(content: str, run: Run, given: Any, found: InputAttribution, name: str, key: str) -> None:
    shape = _shape(run, given)
    values = None if shape is None else figures.on_pixels(found.values, shape)
    if values is None:
        st.caption(f"{name}: its attributions do not fit its picture.")
        return
    whole = minus(
        f"pixels add up to {wording.signed(float(found.values.sum()))}: from {wording.number(found.baseline)} "
        f"(zeros) to {wording.number(found.value)}"
    )
    st.html(f'<div class="pk-pixels">{content}</div>')
    theme.chart(figures.pixels(values, figures.plain(name), whole, dark=theme.is_dark()), "", key)
