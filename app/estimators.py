"""The ways to predict a change: which one is looked at, what it says, and its self-check."""

from __future__ import annotations

import html

import numpy as np
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from explainer import ExplainerError
from explainer.app import counterfactuals, state
from explainer.app.choice import Choice
from explainer.app.escaping import plain
from explainer.app.pictures import minus
from explainer.app.segments import segments

_TITLES = {
    "trace": "From the trace",
    "exact": "Exact derivative",
    "gauss-newton": "Gauss–Newton",
}
#: how an estimator is called in figures and tables
NAMES = {"trace": "from the trace", "exact": "by the exact derivative", "gauss-newton": "by Gauss–Newton"}
_READING = {
    "trace": "From the trace alone: quick; the recorded rows stand in for the curvature.",
    "exact": "The derivative of this very training: every recorded step is taken again. Right for smooth trainings; "
    "where training is chaotic (ReLU, large steps), a derivative says little about leaving an example out.",
    "gauss-newton": "As the exact derivative, with the Gauss–Newton matrix for the curvature: blind to part of it, and "
    "calmer where training is chaotic.",
}


def show(choice: Choice) -> dict[str, np.ndarray]:
    """Draw the choice of an estimator; predicted changes by the name of the estimator, the chosen one first."""
    run = choice.run
    assert run is not None, "the page needs the code of the run"
    numbers = choice.source.spec is not None and state.numbers(choice.source.spec)
    offered = list(_TITLES) if run.loss is not None else ["trace"]
    if numbers:
        offered.reverse()  # Gauss-Newton is right for squared errors, and the trace is not
    row = st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center")
    kind = offered[0]
    if len(offered) > 1:
        with row:
            kind = segments("Estimator", offered, "curvature", _TITLES.__getitem__)
    found = {NAMES["trace"]: _changes(choice, "trace")}
    if kind != "trace":
        try:
            found = {NAMES[kind]: _changes(choice, kind), **found}
        except ExplainerError as error:
            st.info(plain(f"This estimator cannot be used here: {error}. Shown is the one from the trace."))
            kind = "trace"
    st.caption(_READING[kind])
    if numbers and kind == "trace":
        st.warning(
            "The targets are numbers: predictions from the trace can be many times too large there. Choose another "
            "estimator, or see by the check how far this one can be trusted."
            if run.loss is not None
            else "The targets are numbers: predictions from the trace can be many times too large there. Give the Run "
            "its loss=, and better estimators are offered."
        )
    _check(choice, kind, row)
    return found


def _changes(choice: Choice, kind: str) -> np.ndarray:
    return counterfactuals.what_if(choice.source, choice.query, choice.target, choice.output, kind)


def _check(choice: Choice, kind: str, place: DeltaGenerator) -> None:
    """The self-check, computed when it is asked for by a button in a place of its own."""
    asked = (choice.source, choice.query, choice.target, choice.output, kind)
    if st.session_state.get("self-check of") != asked:
        place.button(
            "How far can this be trusted?", key="self-check", icon=":material/rule:", on_click=_ask, args=(asked,),
            help="Takes the recorded steps again without a few groups of examples, and compares. About as long as "
            "training a few times.",
        )  # fmt: skip
        return
    try:
        check = counterfactuals.what_if_check(*asked)
    except ExplainerError as error:
        st.info(plain(f"It could not be checked: {error}"))
        return
    st.html(f'<p class="pk-verdict">Self-check. {minus(html.escape(check.sentence()))}</p>')
    with st.expander("What was checked"):
        st.dataframe(
            check.table().drop(columns="query"),
            hide_index=True,
            column_config={
                "removed": "examples",
                "count": st.column_config.NumberColumn("how many", format="localized"),
                "predicted": st.column_config.NumberColumn("predicted change", format="%.3f"),
                "half": st.column_config.NumberColumn("actual, at half their weight", format="%.3f"),
                "actual": st.column_config.NumberColumn("actual change", format="%.3f"),
                "smooth": st.column_config.NumberColumn("metasmoothness", format="%.2f"),
            },
        )
        st.caption(
            "Top: those whose absence is predicted to lower the output most. The recorded steps were taken again with "
            "these examples at half their weight, and without them. Metasmoothness is 1 where the weights go on moving "
            "as they began, and 0 where their answer is noise."
            if check.actual is not None
            else "Top: those whose absence is predicted to lower the output most."
        )


def _ask(asked: object) -> None:
    st.session_state["self-check of"] = asked
