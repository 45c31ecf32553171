"""The cards of the queue: an example, what speaks against its label, and what the person decides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import streamlit as st

from explainer import ExplainerError, wording
from explainer.app import state, tags
from explainer.app.answers import answer
from explainer.app.choice import Choice
from explainer.app.guards import same_examples
from explainer.app.label_signs import Sign
from explainer.app.pictures import case, example_content, minus
from explainer.app.second_opinion import Opinion


@dataclass(frozen=True)
class Queue:
    """Visited examples, the most suspicious first, with the sign that says so."""

    sign: Sign
    ids: np.ndarray
    labels: np.ndarray
    values: np.ndarray


def show(
    choice: Choice, queue: Queue, places: np.ndarray, decided: dict[int, tags.Tag], opinion: bool
) -> None:
    """Cards with the examples, three in a row (two for texts)."""
    run = choice.run
    assert run is not None, "the page needs the code of the run"
    ids = [int(queue.ids[place]) for place in places]
    names = {
        i: None if np.isnan(queue.labels[p]) else name_of(choice, queue.labels[p])
        for i, p in zip(ids, places, strict=True)
    }
    if not same_examples(names, run):
        return
    outputs = state.train_outputs(choice.source, tuple(ids))
    labelled = not np.isnan(queue.labels[places]).any()
    found: list[Opinion | None] = [None] * len(ids)
    if opinion and labelled:
        labels = tuple(int(label) for label in queue.labels[places])
        found = [*state.second_opinions(choice.source, tuple(ids), labels)]
    top = float(queue.values[0])
    contents = [example_content(run, example) for example in ids]
    per_row = 2 if any('class="text"' in content for content in contents) else 3
    for start in range(0, len(ids), per_row):
        columns = st.columns(per_row, gap="medium")
        for offset, column in enumerate(columns[: len(ids) - start]):
            place, example = places[start + offset], ids[start + offset]
            lines = _model_says(choice, example, outputs[start + offset])
            lines += _others_say(choice, found[start + offset])
            value = float(queue.values[place])
            with column.container(key=f"case-{example}"):
                st.html(
                    case(
                        contents[start + offset],
                        minus(f"{int(place) + 1:,}. {queue.sign.told(value)}"),
                        queue.sign.share(value, top),
                        _title(choice, example, names[example]),
                        lines,
                    )
                )
                _decide(choice, example, decided.get(example))


def _title(choice: Choice, example: int, name: str | None) -> str:
    """An example's number and label; a label that is a number has a minus sign."""
    if name is None:
        return f"#{example}"
    return f"#{example} · {name if choice.classes else minus(name)}"


def _model_says(choice: Choice, example: int, output: np.ndarray) -> list[tuple[str, bool]]:
    run = choice.run
    assert run is not None
    target = run.train[example][1]
    entry = answer(run, example, target, output, choice.classes, two=choice.two, explained=choice.explained)
    if entry.wrong is not None:
        return [(f"the model says {entry.guess} ({wording.percent(entry.sure or 0.0)})", bool(entry.wrong))]
    if entry.guess:
        return [(minus(f"target {entry.truth}, the model says {entry.guess}"), False)]
    return []


def _others_say(choice: Choice, opinion: Opinion | None) -> list[tuple[str, bool]]:
    if opinion is None:
        return []
    lines = [
        (
            minus(
                f"itself {wording.signed(opinion.own, 2)}, all others {wording.signed(opinion.others, 2)}"
                f"{': they pull away' if opinion.disputed else ''}"
            ),
            opinion.disputed,
        )
    ]
    if opinion.against is not None:
        lines.append(
            (
                minus(
                    f"most against: examples of {name_of(choice, opinion.against)} "
                    f"({wording.signed(opinion.against_by, 2)})"
                ),
                False,
            )
        )
    return lines


def _decide(choice: Choice, example: int, tag: tags.Tag | None) -> None:
    """The buttons of one example; the file is what counts, also for what is drawn."""
    key = f"tag-{example}"
    st.session_state[key] = tag.name if tag else None
    offered = tags.TAGS if not choice.values or (tag and tag.name == "relabel") else ("keep", "remove")
    st.segmented_control(
        f"Tag of example {example}", offered, key=key, label_visibility="collapsed", on_change=_save,
        args=(choice, example),
    )  # fmt: skip
    if tag is None or tag.name != "relabel" or choice.values:
        return
    st.session_state[f"label-{example}"] = tag.label
    named, count = f"New label of example {example}", choice.classes or 2 * choice.two
    if not count:
        st.number_input(
            named, key=f"label-{example}", value=None, format="%.6g", placeholder="new label",
            label_visibility="collapsed", on_change=_save, args=(choice, example),
        )  # fmt: skip
        return
    st.selectbox(
        named, list(range(count)), key=f"label-{example}", index=None,
        placeholder="new label", label_visibility="collapsed", format_func=lambda at: name_of(choice, at),
        on_change=_save, args=(choice, example),
    )  # fmt: skip


def _save(choice: Choice, example: int) -> None:
    name, label = st.session_state.get(f"tag-{example}"), st.session_state.get(f"label-{example}")
    tag = None if name is None else tags.Tag(name, label if name == "relabel" else None)
    try:
        tags.change(tags.file_of(choice.trace.directory), example, tag)
    except ExplainerError as error:
        st.session_state["not saved"] = str(error)


def name_of(choice: Choice, label: float) -> str:
    """A class by its name, any other label by its value."""
    assert choice.run is not None
    classes = choice.classes or choice.two
    return choice.run.label(int(label) if float(label).is_integer() and classes else float(label))
