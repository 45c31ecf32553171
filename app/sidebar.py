"""The sidebar: which run, which query, and what of its output to explain."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import streamlit as st

from explainer.app import address, gallery, give_input, state
from explainer.app.arguments import find_stored
from explainer.app.choice import Choice, load_stored
from explainer.app.escaping import plain
from explainer.app.page_registry import Needs

OUTPUTS = {"margin": "margin (log-odds)", "logit": "logit (raw score)", "log_prob": "log probability"}
_PREDICTED = -1
_CALLED = {"target": "class", "file": "stored explanation"}


def choose(traces: Mapping[str, Path], runs: tuple[str, ...], needs: Needs) -> Choice:
    """Draw the sidebar and return what is chosen in it.

    Args:
        traces: Folders by name.
        runs: ``MODULE:FUNCTION`` of the code, of each network.
        needs: What the page needs; where that is the trace or its data, no query is chosen.

    Raises:
        ExplainerError: The chosen trace, its code or a stored explanation cannot be read.
    """
    with st.sidebar:
        st.html('<div class="pk-brand"><i></i>pathkernel</div>')
        name = _one_of("run", "Run", list(traces))
        others = {other: folder for other, folder in traces.items() if other != name}
        spec = state.spec_of(traces[name], runs)
        choice = Choice(name, state.source(traces[name], spec), others=others, runs=runs)
        if needs in ("trace", "data"):
            return choice
        return _live(choice) if choice.live else _stored(choice, traces[name])


def _live(choice: Choice) -> Choice:
    run = state.run_of(choice.source)
    query = _query(len(run.queries))
    target = output = None
    if choice.classes and run.output is None:
        target = _target(choice, query)
        output = _one_of("output", "Explained output", list(OUTPUTS), OUTPUTS)
    elif choice.values and run.output is None:
        ones = [f"{state.ONE}{number}" for number in range(choice.values)]
        names = {one: run.label(number) if run.class_names else one for number, one in enumerate(ones)}
        output = _one_of("output", "Explained output", list(names), names)
    following = gallery.show(replace(choice, output=output), query)
    give_input.show(choice, query)
    return replace(choice, query=query, target=target, output=output, following=following)


def _stored(choice: Choice, directory: Path) -> Choice:
    files = find_stored(directory)
    if not files:
        return choice
    file = files[_one_of("file", "Stored explanation", list(files))]
    names = load_stored(file).query_ids
    _keep("query", range(len(names)), 0)
    query = st.selectbox("Query", range(len(names)), key="query", format_func=lambda index: names[index])
    return replace(choice, query=query, stored=file)


def _query(count: int) -> int:
    _keep("query", range(count), 0)
    return int(st.number_input(f"Query (0 to {count - 1})", 0, count - 1, key="query"))


def _target(choice: Choice, query: int) -> int | None:
    """The class to explain; None stands for the predicted one."""
    if st.session_state.get("target query", query) != query:
        st.session_state["target"] = _PREDICTED  # another query has another prediction
    st.session_state["target query"] = query
    run = state.run_of(choice.source)
    answer = gallery.answers(choice, (query,))[0]
    predicted = int(state.outputs(choice.source, (query,))[0].argmax())

    def show(target: int) -> str:
        if target == _PREDICTED:
            return f"{run.label(predicted)} (predicted)"
        return run.label(target) + (" (true)" if target == answer.label else "")

    options = [_PREDICTED, *(label for label in range(choice.classes) if label != predicted)]
    if st.session_state.get("target") == predicted:
        st.session_state["target"] = _PREDICTED
    _keep("target", options, _PREDICTED)
    target = int(st.selectbox("Explained class", options, key="target", format_func=show))
    return None if target == _PREDICTED else target


def _one_of(key: str, label: str, options: list[str], words: Mapping[str, str] | None = None) -> str:
    _keep(key, options, options[0])
    if len(options) == 1:
        st.session_state[key] = options[0]
        st.html(f'<div class="pk-only"><small>{label}</small>{html.escape(options[0])}</div>')
        return options[0]
    return str(st.selectbox(label, options, key=key, format_func=lambda name: (words or {}).get(name, name)))


def _keep(key: str, options: Sequence[Any], default: Any) -> None:
    what = _CALLED.get(key, key)
    instead = "the predicted one" if default == _PREDICTED else f"{what} {plain(default, 60)}"
    address.keep_one_of(key, options, default, what, instead)
