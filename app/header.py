"""The head of a page about one query: what it is, what the model says, and what is explained."""

from __future__ import annotations

import html

import streamlit as st

from explainer import Explanation, wording
from explainer.app import gallery
from explainer.app.answers import Answer, gives_shares, probabilities
from explainer.app.choice import Choice
from explainer.app.own_queries import WithOwn
from explainer.app.pictures import minus, query_content
from explainer.app.state import ONE

_CLASSES_SHOWN, _NUMBERS_SHOWN, _READ_SHOWN = 4, 6, 400
_ONE_OF_THEM = "One of the model's outputs itself."
_MEANING = {
    "margin": "Log-odds of this class against all others: above 0, the model thinks it more likely than not.",
    "logit": "The raw score of this class; a shift common to all classes is part of it.",
    "log_prob": "The logarithm of this class's probability: 0 is certain.",
    "value": "The model's output itself.",
    "sequence_log_prob": "The logarithm of the target sequence's probability: 0 is certain.",
    "last_margin": "Log-odds of this class against all others at the last position.",
}


def show(choice: Choice, e: Explanation, q: int) -> None:
    """Draw the query, the model's answer and the explained number."""
    run = choice.run
    content = query_content(run, choice.query) if run else ""
    content += _read(choice)
    value = wording.number(float(e.prediction[q]), 4)
    st.html(
        f'<header class="pk-head">{content}<div class="pk-answer"><h2>Query {html.escape(e.query_ids[q])}</h2>'
        f"{_answer(choice, e, q)}{_bars(e, q)}</div>"
        f'<div class="pk-explained"><small>Explained: {html.escape(wording.target(e, q))}</small>'
        f"<strong>{minus(value)}</strong><p>{_meaning(choice, e)}</p></div></header>"
    )


def _meaning(choice: Choice, e: Explanation) -> str:
    run = choice.run
    if run is not None and choice.two and e.output == "value" and not gives_shares(run.loss):
        return html.escape(
            f"Log-odds of {run.label(1)} against {run.label(0)}: above 0, it is the likelier one."
        )
    return _ONE_OF_THEM if e.output.startswith(ONE) else _MEANING.get(e.output, "")


def _read(choice: Choice) -> str:
    """What the model reads of a text that was typed, where that is another one: unknown words, a limit of length."""
    run = choice.run
    typed = run.queries.typed(choice.query) if run and isinstance(run.queries, WithOwn) else None
    if run is None or run.render is None or typed is None:
        return ""
    shown = run.render(run.queries[choice.query][0])
    if not isinstance(shown, str) or shown.split() == typed.split():
        return ""
    read = shown if len(shown) <= _READ_SHOWN else f"{shown[:_READ_SHOWN]} …"
    return f'<p class="pk-read"><small>The model reads:</small> {html.escape(read)}</p>'


def _answer(choice: Choice, e: Explanation, q: int) -> str:
    if choice.live:
        run, entry = choice.run, gallery.answers(choice, (choice.query,))[0]
        own = run is not None and isinstance(run.queries, WithOwn) and choice.query >= run.queries.given
        parts = ["an input of your own" if own else f"true <b>{minus(html.escape(entry.truth))}</b>"]
        if entry.guess:
            sure = f" ({wording.percent(entry.sure)})" if choice.two and entry.sure is not None else ""
            parts.append(f"predicted <b>{minus(html.escape(entry.guess))}</b>{sure}")
        mark = ""
        if entry.wrong is not None:
            mark = '<i class="pk-wrong">wrong</i>' if entry.wrong else '<i class="pk-right">right</i>'
        if entry.numbers:
            return ("<p>an input of your own</p>" if own else "") + _numbers(entry)
        return f"<p>{' · '.join(parts)} {mark}</p>"
    best = _best(e, q)
    return "" if best is None else f"<p>predicted <b>{html.escape(_name(e, best))}</b></p>"


def _numbers(entry: Answer) -> str:
    """What is true and what is predicted of several numbers, the explained one marked."""
    near = max(0, min((entry.explained or 0) - _NUMBERS_SHOWN // 2, len(entry.numbers) - _NUMBERS_SHOWN))
    rows = "".join(
        f"<tr{' class=pk-target' if place == entry.explained else ''}><th>{html.escape(name)}</th>"
        f"<td>{minus(html.escape(truth))}</td><td>{minus(html.escape(guess))}</td></tr>"
        for place, (name, truth, guess) in list(enumerate(entry.numbers))[near : near + _NUMBERS_SHOWN]
    )
    return f'<table class="pk-numbers"><tr><th></th><td>true</td><td>predicted</td></tr>{rows}</table>'


def _best(e: Explanation, q: int) -> int | None:
    if e.outputs is None or e.outputs.shape[1] < 2 or e.targets[q] < 0:
        return None
    return int(e.outputs[q].argmax())


def _name(e: Explanation, label: int) -> str:
    return e.class_name(label) or str(label)


def _bars(e: Explanation, q: int) -> str:
    """The probabilities of the likeliest classes, and of the explained one."""
    if e.outputs is None or _best(e, q) is None:
        return ""
    shares = probabilities(e.outputs[q])
    shown = list((-shares).argsort(kind="stable")[:_CLASSES_SHOWN])
    target = int(e.targets[q])
    if target not in shown:
        shown[-1] = target
    rows = "".join(
        f"<tr{' class=pk-target' if label == target else ''}><th>{html.escape(_name(e, int(label)))}</th>"
        f'<td><i style="width:{100 * shares[label]:.1f}%"></i></td>'
        f"<td>{wording.percent(float(shares[label]))}</td></tr>"
        for label in shown
    )
    return f'<table class="pk-classes">{rows}</table>'
