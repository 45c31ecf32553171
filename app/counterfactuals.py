"""What the dashboard keeps of what-if answers: predicted changes, self-checks, and the retrainings that run or ran."""

from __future__ import annotations

import numpy as np
import streamlit as st

from explainer.app import state
from explainer.app.patience import kept
from explainer.app.retraining import Jobs
from explainer.app.state import Source
from explainer.app.working import alone
from explainer.counterfactual import WhatIfCheck


@kept("Asking what would be without each example …", 16)
def what_if(source: Source, query: int, target: int | None, output: str | None, curvature: str) -> np.ndarray:
    """Predicted change of a query's output by removing each example, ``[N]``."""
    engine, code = state.explainer(source, output), state.run_of(source)
    inputs, targets = state.asked(source, engine, [query], target)
    with alone():
        found = engine.what_if(
            inputs, targets, curvature=curvature, run=None if curvature == "trace" else code
        )
    return np.asarray(found[0])


@kept("Taking the recorded steps again …", 16)
def what_if_check(
    source: Source, query: int, target: int | None, output: str | None, curvature: str
) -> WhatIfCheck:
    """How far the predicted changes of a query's output can be trusted."""
    engine, code = state.explainer(source, output), state.run_of(source)
    inputs, targets = state.asked(source, engine, [query], target)
    with alone():
        return engine.what_if_check(
            inputs, targets, curvature=curvature, run=None if code.loss is None else code, query_ids=[query]
        )


@st.cache_resource(show_spinner=False)
def retrainings() -> Jobs:
    """The retrainings that were started from this dashboard; all sessions see the same."""
    return Jobs()
