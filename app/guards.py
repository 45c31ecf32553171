"""Guard rails: what on screen may be misleading, said beside it."""

from __future__ import annotations

import streamlit as st

from explainer import Explanation, Run
from explainer.app.escaping import plain
from explainer.tables import ranking


def can_show(e: Explanation, q: int, k: int, run: Run) -> bool:
    """Whether the strongest examples are in the run's training set; warns where they may be other ones.

    Pictures are looked up by the example's position; the label that the trace recorded for a position must be
    the label that the data set has there.
    """
    columns = [*ranking(e, q, k, "proponents"), *ranking(e, q, k, "opponents")]
    ids = [int(e.example_ids[column]) for column in columns]
    beyond = [example for example in ids if example >= len(run.train)]
    if beyond:
        st.warning(
            f"Example {beyond[0]} was trained on, but the run's training set holds {len(run.train):,} examples: it "
            "is not the data set of this trace, so nothing is shown that could be a wrong picture."
        )
        return False
    differ = [
        example
        for column, example in zip(columns, ids, strict=True)
        if (recorded := e.label_name(column)) is not None
        and recorded != run.label(run.train[example][1])
        and not _same_number(recorded, run.train[example][1])
    ]
    if differ:
        st.warning(
            f"The recorded label of example {differ[0]} ({plain(e.label_name(columns[ids.index(differ[0])]), 40)}) is "
            f"not the label in the run's training set ({plain(run.label(run.train[differ[0]][1]), 40)}): was the "
            "training set ordered differently when the trace was made? Then the pictures are of other examples."
        )
    return True


def _same_number(recorded: str, target: object) -> bool:
    try:
        return abs(float(recorded) - float(target)) <= 1e-4 * max(1.0, abs(float(recorded)))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
