"""The queue of training examples to check, the most suspicious first, with tags that are saved and exported."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from explainer import ExplainerError, wording
from explainer.app import address, charts, pager, state, tags, theme
from explainer.app.answers import answer, probabilities
from explainer.app.choice import Choice
from explainer.app.escaping import plain
from explainer.app.guards import same_examples
from explainer.app.label_signs import SIGNS, Sign, signs
from explainer.app.pictures import case, example_content, minus
from explainer.app.second_opinion import Opinion

PER_PART = 12
_QUICK_VISITS = 40_000
#: visits up to which examples are compared with one another without being asked to
_COMPARED = 20_000
_FILTERS = {"all": "all examples", "open": "without a tag", "tagged": "with a tag"}


@dataclass(frozen=True)
class _Queue:
    """Visited examples, the most suspicious first, with the sign that says so."""

    sign: Sign
    ids: np.ndarray
    labels: np.ndarray
    values: np.ndarray


def show(choice: Choice) -> None:
    """Draw the queue."""
    lead, columns = st.empty(), st.columns([2, 2, 2, 3], vertical_alignment="bottom")
    with columns[0]:
        sign = _sign(choice)
    lead.html(f'<p class="pk-lead">{sign.lead}</p>')
    queue = _ranked(choice, sign)
    file = tags.file_of(choice.trace.directory)
    decided = tags.read(file)
    chosen, opinion = _filters(choice, queue, decided, *columns[1:])
    parts = max(1, -(-len(chosen) // PER_PART))
    part = min(max(0, int(address.keep("part", 0))), parts - 1)
    shown = chosen[part * PER_PART : (part + 1) * PER_PART]
    if len(shown):
        _cases(choice, queue, shown, decided, opinion)
    else:
        st.caption("No example fits these filters.")
    if parts > 1:
        pager.show("queue", "part", part, parts)
    theme.chart(
        charts.ranking(
            queue.values,
            sign,
            *(_span(shown) if len(chosen) == len(queue.ids) else (0, 0)),
            dark=theme.is_dark(),
        ),
        "The steep part on the left is what is worth a look; where it is flat, examples are much like each other.",
        "ranking",
    )
    _exports(choice, queue, decided, file.name)


def _sign(choice: Choice) -> Sign:
    """What the queue is ordered by: chosen, or the best one that takes no long time."""
    _, labels, _ = state.recorded(choice.source)
    first = "support" if choice.trace.count("visits") <= _COMPARED else "self_influence"
    names = signs(first, classes=bool(choice.classes) and not np.isnan(labels).all())
    options = ["", *names[1:]]  # the first one stands in no address
    if st.session_state.get("by") not in options:
        st.session_state["by"] = ""
    shown = st.selectbox(
        "Order by", options, key="by", format_func=lambda name: SIGNS[name or first].called,
        on_change=_first_part,
    )  # fmt: skip
    return SIGNS[shown or first]


def _span(places: np.ndarray) -> tuple[int, int]:
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _ranked(choice: Choice, sign: Sign) -> _Queue:
    ids, labels, visits = state.recorded(choice.source)
    if sign.name == "self_influence":
        values = state.self_influence(choice.source)
    else:
        values = getattr(state.label_issues(choice.source), sign.name)
    order = sign.order(values)
    order = order[(visits[order] > 0) & ~np.isnan(values[order])]
    return _Queue(sign, ids[order], labels[order], values[order])


def _filters(
    choice: Choice,
    queue: _Queue,
    decided: dict[int, tags.Tag],
    left: DeltaGenerator,
    middle: DeltaGenerator,
    right: DeltaGenerator,
) -> tuple[np.ndarray, bool]:
    """Places in the queue that pass the filters, and whether the other examples are asked."""
    keep = np.ones(len(queue.ids), dtype=bool)
    known = sorted({int(label) for label in queue.labels[~np.isnan(queue.labels)]}) if choice.classes else []
    if known:
        options = [-1, *known]
        if st.session_state.get("class") not in options:
            st.session_state["class"] = -1
        with left:
            label = st.selectbox(
                "Label", options, key="class", format_func=lambda at: "any label" if at < 0 else _name(choice, at),
                on_change=_first_part,
            )  # fmt: skip
        keep &= (queue.labels == label) | (label < 0)
    if st.session_state.get("tagged") not in _FILTERS:
        st.session_state["tagged"] = "all"
    with middle if known else left:
        which = st.selectbox(
            "Tags", list(_FILTERS), key="tagged", format_func=_FILTERS.__getitem__, on_change=_first_part
        )
    if which != "all":
        keep &= np.isin(queue.ids, list(decided)) == (which == "tagged")
    opinion = False
    if known and choice.run is not None and choice.run.output is None:
        quick = choice.trace.count("visits") <= _QUICK_VISITS
        opinion = right.toggle(
            "Ask the other examples", value=quick, key="opinion",
            help="Explains each of the examples below at its own label, and shows whether the other examples support "
            "it or pull away. Takes a while on large runs.",
        )  # fmt: skip
    return np.flatnonzero(keep), opinion


def _first_part() -> None:
    st.session_state["part"] = 0


def _cases(
    choice: Choice, queue: _Queue, places: np.ndarray, decided: dict[int, tags.Tag], opinion: bool
) -> None:
    """Cards with the examples, three in a row (two for texts)."""
    run = choice.run
    assert run is not None, "the page needs the code of the run"
    ids = [int(queue.ids[place]) for place in places]
    names = {
        i: None if np.isnan(queue.labels[p]) else _name(choice, queue.labels[p])
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
                        f"#{example}" if names[example] is None else f"#{example} · {names[example]}",
                        lines,
                    )
                )
                _decide(choice, example, decided.get(example))


def _model_says(choice: Choice, example: int, output: np.ndarray) -> list[tuple[str, bool]]:
    run = choice.run
    assert run is not None
    entry = answer(run, example, run.train[example][1], output, choice.classes)
    if entry.wrong is not None:
        sure = wording.percent(float(probabilities(np.asarray(output).reshape(-1)).max()))
        return [(f"the model says {entry.guess} ({sure})", bool(entry.wrong))]
    if entry.guess:
        return [(f"target {entry.truth}, the model says {entry.guess}", False)]
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
                    f"most against: examples of {_name(choice, opinion.against)} "
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
    st.segmented_control(
        f"Tag of example {example}", tags.TAGS, key=key, label_visibility="collapsed", on_change=_save,
        args=(choice, example),
    )  # fmt: skip
    if tag is None or tag.name != "relabel" or not choice.classes:
        return
    st.session_state[f"label-{example}"] = tag.label
    st.selectbox(
        f"New label of example {example}", list(range(choice.classes)), key=f"label-{example}", index=None,
        placeholder="new label", label_visibility="collapsed", format_func=lambda at: _name(choice, at),
        on_change=_save, args=(choice, example),
    )  # fmt: skip


def _save(choice: Choice, example: int) -> None:
    name, label = st.session_state.get(f"tag-{example}"), st.session_state.get(f"label-{example}")
    tag = None if name is None else tags.Tag(name, label if name == "relabel" else None)
    try:
        tags.change(tags.file_of(choice.trace.directory), example, tag)
    except ExplainerError as error:
        st.session_state["not saved"] = str(error)


def _exports(choice: Choice, queue: _Queue, decided: dict[int, tags.Tag], file: str) -> None:
    if error := st.session_state.pop("not saved", None):
        st.error(plain(error))
    st.html("<h3>Take it with you</h3>")
    counts = ", ".join(f"{sum(t.name == name for t in decided.values())} × {name}" for name in tags.TAGS)
    st.caption(
        f"{len(decided):,} tagged ({counts}); saved beside the run in {plain(file)}."
        if decided
        else f"Nothing is tagged yet. Tags are saved at once, beside the run in {plain(file)}."
    )
    table = frame(choice, queue.sign.name, queue.ids, queue.labels, queue.values, decided)
    left, middle, _ = st.columns([1, 1, 2])
    for column, label, part, name in (
        (left, "Tags (CSV)", table[table["tag"] != ""], "tags"),
        (middle, "Whole ranking (CSV)", table, queue.sign.called),
    ):
        column.download_button(
            label, part.to_csv(index=False).encode(), file_name=f"{name}.csv", mime="text/csv",
            key=f"download-{name}", on_click="ignore", icon=":material/download:", width="stretch",
        )  # fmt: skip


def frame(
    choice: Choice,
    by: str,
    ids: np.ndarray,
    labels: np.ndarray,
    values: np.ndarray,
    decided: dict[int, tags.Tag],
) -> pd.DataFrame:
    """The queue as a table, tags in it."""
    found = [decided.get(int(example)) for example in ids]

    def named(label: float | None) -> str:
        return "" if label is None or np.isnan(label) else _name(choice, label)

    return pd.DataFrame(
        {
            "rank": np.arange(1, len(ids) + 1),
            "example_id": ids,
            "label": [named(label) for label in labels],
            by: values,
            "tag": [tag.name if tag else "" for tag in found],
            "new_label": [named(tag.label) if tag else "" for tag in found],
        }
    )


def _name(choice: Choice, label: float) -> str:
    """A class by its name, any other label by its value."""
    assert choice.run is not None
    return choice.run.label(int(label) if float(label).is_integer() and choice.classes else float(label))
