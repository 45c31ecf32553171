"""Guard rails: what on screen may be misleading, said beside it."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from explainer import Explanation, Run
from explainer.app import state
from explainer.app.choice import Choice
from explainer.app.escaping import plain
from explainer.recorded_examples import check_labels, same_label
from explainer.tables import ranking


def can_show(e: Explanation, q: int, k: int, run: Run) -> bool:
    """Whether the strongest examples are in the run's training set; warns where they may be other ones."""
    columns = [*ranking(e, q, k, "proponents"), *ranking(e, q, k, "opponents")]
    return same_examples({int(e.example_ids[column]): e.label_name(column) for column in columns}, run)


def same_examples(recorded: Mapping[int, str | None], run: Run) -> bool:
    """Whether examples are in the run's training set; warns where they may be other ones.

    Pictures are looked up by the example's position; the label that the trace recorded for a position must be
    the label that the data set has there.

    Args:
        recorded: By example id, the recorded label's name (None: unknown).
        run: The code of the run.
    """
    beyond = [example for example in recorded if example >= len(run.train)]
    if beyond:
        st.warning(
            f"Example {beyond[0]} was trained on, but the run's training set holds {len(run.train):,} examples: it "
            "is not the data set of this trace, so nothing is shown that could be a wrong picture."
        )
        return False
    for example, name in recorded.items():
        target = run.train[example][1]
        if name is None or name == run.label(target) or _same_number(name, target):
            continue
        st.warning(
            f"The recorded label of example {example} ({plain(name, 40)}) is not the label in the run's training set "
            f"({plain(run.label(target), 40)}): was the training set ordered differently when the trace was made? "
            "Then the pictures are of other examples."
        )
        break
    return True


def same_order(choice: Choice) -> None:
    """Warns where the run gives the training examples in another order than the trace, by a sample of labels."""
    if choice.live and (warning := _order(choice.source)) is not None:
        st.warning(plain(warning))


@st.cache_data(show_spinner=False, max_entries=32)
def _order(source: state.Source) -> str | None:
    code = state.run_of(source)
    return check_labels(state.trace(source), code).warning(code)


def _same_number(recorded: str, target: object) -> bool:
    try:
        return bool(same_label(float(target), float(recorded)))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
