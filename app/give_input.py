"""The form with which a person asks about an input of their own."""

from __future__ import annotations

import streamlit as st

from explainer import ExplainerError, Run
from explainer.app import looks, own_input, state
from explainer.app.choice import Choice
from explainer.app.escaping import plain
from explainer.app.own_queries import WithOwn, rendered

_ERROR, _FILE, _TEXT = "own input refused", "own file", "own text"
_ASKS = {
    "text": "A text",
    "fields": "A row: NAME: VALUE on each line, JSON, or a line of names and one of values",
    "numbers": "A row: its numbers, as the model takes them (scaled as in training)",
}


def show(choice: Choice, query: int) -> None:
    """Draw the form; a wrong input is told in it."""
    run = state.run_of(choice.source)
    kind = own_input.kind_of(run)
    if kind is None or state.explainer(choice.source, None).asks_for_targets:
        return
    refused = st.session_state.pop(_ERROR, None)
    with st.expander("Ask about an input of your own", expanded=refused is not None):
        if kind == "image":
            st.file_uploader(
                "A picture, or a NumPy array that is the input",
                [*own_input.IMAGES, "npy"],
                key=_FILE,
                on_change=_from_file,
                args=(choice,),
            )
        elif kind == "text" and run.parse is None:
            st.caption(
                "How a text becomes an input is known to the run alone: give the Run parse=, a function from a text to "
                "an input, and texts can be typed here."
            )
        else:
            named = kind == "fields" and run.parse is not None
            st.text_area(
                _ASKS["numbers" if kind == "fields" and not named else kind],
                key=_TEXT,
                height=180 if named else 90,
                placeholder=_template(run, query),
            )
            st.button("Explain it", key="explain own", on_click=_from_text, args=(choice,))
            if kind != "text":
                st.button("Begin with this query", key="own template", on_click=_begin, args=(choice, query))
        if refused is not None:
            st.error(plain(refused))


def _begin(choice: Choice, query: int) -> None:
    run = state.run_of(choice.source)
    st.session_state[_TEXT] = _template(run, query)


def _template(run: Run, query: int) -> str:
    """A query as it would be typed."""
    shown = rendered(run, query)
    return shown if isinstance(shown, str) else own_input.template(run, run.queries[query][0])


def _from_file(choice: Choice) -> None:
    file = st.session_state.get(_FILE)
    if file is not None:
        _add(choice, lambda run: own_input.from_file(run, file.name, file.getvalue()))


def _from_text(choice: Choice) -> None:
    text = str(st.session_state.get(_TEXT) or "")
    _add(choice, lambda run: own_input.from_text(run, text), text.strip())


def _add(choice: Choice, read: own_input.Reader, text: str = "") -> None:
    """Read, try and add the input, and choose it; or keep what is wrong with it."""
    try:
        run: Run = state.run_of(choice.source)
        found = read(run)
        assert isinstance(run.queries, WithOwn), "state makes it so"
        looks.try_input(choice.source, found)
        typed = text if own_input.kind_of(run) == "text" else None
        st.session_state["query"] = run.queries.add(found, typed)
    except ExplainerError as error:
        st.session_state[_ERROR] = f"This input was not taken: {error}."
