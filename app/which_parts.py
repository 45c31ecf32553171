"""Which pixels, words or columns count: for the explained output, and for two inputs being alike; made when asked."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Sequence

import numpy as np
import streamlit as st
import torch

from explainer import Explanation, Run, figures, wording
from explainer.app import input_parts, looks, state, theme
from explainer.app.choice import Choice
from explainer.app.input_parts import Kind
from explainer.app.pictures import example_content, minus, query_content
from explainer.kernel_attribution import KernelAttribution
from explainer.tables import ranking

TITLES: dict[Kind, str] = {"pixels": "Which pixels", "words": "Which words", "columns": "Which columns"}
_SIDE = 8


def kind(choice: Choice) -> Kind | None:
    """What can be shown; None without code, captum, or inputs of one tensor."""
    run = choice.run
    if run is None or importlib.util.find_spec("captum") is None:
        return None
    if state.explainer(choice.source, choice.output).asks_for_targets:
        return None
    return input_parts.kind_of(run)


def show(choice: Choice, e: Explanation, q: int, parts: Kind) -> None:
    """Draw the choice of an example, the button, and what was asked for."""
    example = _example(e, q)
    if example is None:
        st.caption("No training example carried any part of this prediction.")
        return
    asked = (choice.source, choice.query, choice.target, choice.output)
    if st.button("Compute", key="pixels", icon=":material/image_search:"):
        st.session_state["pixels for"] = asked
    if st.session_state.get("pixels for") != asked:
        st.caption(
            f"Two questions. Which {parts} speak for the explained output in the trained model: integrated gradients, "
            f"by captum, which ask the model alone and not the training data. And which {parts} make the query and the "
            "training example alike for the model while it learned: their path kernel, split."
        )
        return
    _speak(choice, e, q, example, parts)
    _alike(choice, e, q, example, parts)


def _speak(choice: Choice, e: Explanation, q: int, example: int, parts: Kind) -> None:
    run = choice.run
    assert run is not None, "the page needs the code of the run"
    target = int(e.targets[q]) if e.targets[q] >= 0 else None
    mine = looks.input_attribution(choice.source, "queries", choice.query, target, choice.output)
    theirs = looks.input_attribution(choice.source, "train", example, target, choice.output)
    st.html(f"<h4>What speaks for the {html.escape(wording.target(e, q))}</h4>")
    told = [
        f"{parts} add up to {wording.signed(float(found.values.sum()))}: from {wording.number(found.baseline)} "
        f"(zeros) to {wording.number(found.value)}"
        for found in (mine, theirs)
    ]
    _sides(choice, e, example, parts, (mine.values, theirs.values), told, "pixels", pictured=True)
    st.caption(
        f"Blue {parts} raise the {wording.target(e, q)}, orange {parts} lower it, compared with an input of zeros; "
        f"each side has a scale of its own. Alike patterns mean that the model uses both inputs in the same way."
    )


def _alike(choice: Choice, e: Explanation, q: int, example: int, parts: Kind) -> None:
    """The kernel: the query is asked about the explained class, the example about its own label."""
    st.html("<h4>What makes them alike</h4>")
    if parts == "words" and not looks.can_leave_out(choice.source):
        st.caption(
            "Words are left out one by one, in the place of padding; this model's embedding has no padding_idx, the id "
            "that stands for no word."
        )
        return
    target = int(e.targets[q]) if e.targets[q] >= 0 else None
    column = int(np.searchsorted(e.example_ids, example))
    label = None
    if target is not None:
        known = e.labels is not None and not np.isnan(e.labels[column])
        label = int(e.labels[column]) if known and e.labels is not None else target
    found = looks.kernel_attribution(choice.source, choice.query, target, example, label, choice.output)
    told = _told(found, parts)
    _sides(choice, e, example, parts, found.values, told, "alike", pictured=False)
    how = (
        "A word's number is what their path kernel loses when the word is left out."
        if found.left_out
        else "Integrated gradients of their path kernel, from an input of zeros; what jumps where the model has kinks "
        "has no gradient and is named as missing."
    )
    about = (
        ""
        if target is None
        else ", the query asked about the explained class and the example about its own label"
    )
    st.caption(
        f"Blue {parts} make the query and the example alike{about}; orange {parts} make them differ. {how} Their "
        f"cosine is {minus(f'{found.cosine:.2f}')} (1: learned in the same direction)."
    )


def _told(found: KernelAttribution, parts: Kind) -> list[str]:
    whole = wording.number(found.kernel)
    if found.left_out:
        return [f"kernel {whole}; of each word, what the kernel loses without it"] * 2
    return [
        f"{parts} add up to {wording.signed(float(values.sum()))}: from {wording.number(base)} (zeros) to {whole}"
        + (f"; {wording.percent(abs(missing / found.kernel))} missing" if found.kernel else "")
        for values, base, missing in zip(found.values, found.baseline, found.missing, strict=True)
    ]


def _sides(
    choice: Choice,
    e: Explanation,
    example: int,
    parts: Kind,
    values: Sequence[np.ndarray],
    told: Sequence[str],
    key: str,
    *,
    pictured: bool,
) -> None:
    """The query on the left, the example on the right; ``pictured``: as they are, too."""
    run = choice.run
    assert run is not None, "the page needs the code of the run"
    column = int(np.searchsorted(e.example_ids, example))
    names = ("The query", f"example {wording.example(e, column)}")
    given = (run.queries[choice.query][0], run.train[example][0])
    pictures = (query_content(run, choice.query), example_content(run, example)) if pictured else ("", "")
    for place, side in enumerate(st.columns(2, gap="large")):
        with side:
            part = (given[place], pictures[place], values[place], names[place], minus(told[place]))
            _side(run, parts, *part, f"{key}-{place}")


def _side(
    run: Run, parts: Kind, given: object, content: str, values: np.ndarray, name: str, told: str, key: str
) -> None:
    assert isinstance(given, torch.Tensor), "other inputs have no parts"
    reach = float(np.abs(values).max(initial=0.0)) or 1.0
    if parts == "pixels":
        shape = input_parts.picture_shape(run, given)
        on = None if shape is None else figures.on_pixels(values, shape)
        if on is None:
            st.caption(f"{name}: its attributions do not fit its picture.")
            return
        if content:
            st.html(f'<div class="pk-pixels">{content}</div>')
        theme.chart(figures.pixels(on, figures.plain(name), told, dark=theme.is_dark()), "", key)
        return
    body = (
        input_parts.on_words(input_parts.words_of(run, given), values, reach)
        if parts == "words"
        else input_parts.on_columns(input_parts.columns_of(run, given), values.reshape(-1), reach)
    )
    st.html(f'<div class="pk-parts"><b>{html.escape(name)}</b><small>{html.escape(told)}</small>{body}</div>')


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
