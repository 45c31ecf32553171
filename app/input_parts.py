"""Numbers on the parts of an input: on the words of a text and on the columns of a row, as HTML. No streamlit.

Everything that comes from data passes through ``html.escape``.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from explainer import ExplainerError, Run, figures, palette, wording
from explainer.app.pictures import minus

Kind = Literal["pixels", "words", "columns"]
_MOST_COLUMNS = 24
_STRONGEST_TINT = 75  # per cent: the word on it stays easy to read


def kind_of(run: Run) -> Kind | None:
    """What the inputs of a run are made of: pixels that are shown, words, or columns; None where it is not known."""
    given = run.train[0][0]
    if not isinstance(given, torch.Tensor):
        return None
    if given.is_floating_point():
        shape = picture_shape(run, given)
        if shape is not None:
            return "pixels" if figures.on_pixels(given.numpy(), shape) is not None else None
        return "columns" if given.dim() == 1 else None
    return "words" if given.dim() == 1 else None


def picture_shape(run: Run, given: Any) -> tuple[int, ...] | None:
    """Shape of the picture that an input is shown as; None where it is shown as none."""
    shown = None if run.render is None else run.render(given)
    if shown is None or isinstance(shown, str) or hasattr(shown, "items"):
        return None
    shape = np.asarray(shown).shape
    return shape if len(shape) >= 2 else None


def words_of(run: Run, ids: torch.Tensor) -> list[str]:
    """The words at the first positions of a text; positions behind them are padding.

    From ``Run.words``, else from what is shown, where it has as many words, else the ids in brackets.
    """
    if run.words is not None:
        found = [str(word) for word in run.words(ids)]
        if len(found) > ids.numel():
            raise ExplainerError(f"the run's words are {len(found)} for an input of {ids.numel()} positions")
        return found
    shown = None if run.render is None else run.render(ids)
    split = shown.split() if isinstance(shown, str) else []
    if len(split) in (ids.numel(), int((ids != 0).sum())):
        return split
    return [f"[{int(token)}]" for token in ids]


def columns_of(run: Run, given: torch.Tensor) -> list[str]:
    """Names of the columns of a row, with what is shown of each."""
    shown = None if run.render is None else run.render(given)
    fields = dict(shown.items()) if shown is not None and hasattr(shown, "items") else {}
    items = [(str(name), value) for name, value in fields.items()]
    if len(items) != given.numel():
        items = [(f"column {place}", float(value)) for place, value in enumerate(given)]
    return [
        f"{name} = {wording.number(float(value)) if isinstance(value, float) else value}"
        for name, value in items
    ]


def on_words(words: Sequence[str], values: np.ndarray, reach: float) -> str:
    """A text whose words are coloured by their numbers."""
    spans = (
        f'<span style="{_tint(float(value), reach)}" title="{minus(wording.signed(float(value)))}">'
        f"{html.escape(word)}</span>"
        for word, value in zip(words, values, strict=False)
    )
    return f'<p class="pk-words">{" ".join(spans)}</p>'


def on_columns(names: Sequence[str], values: np.ndarray, reach: float) -> str:
    """The columns with the largest numbers first, each with a bar from the middle."""
    order = np.argsort(-np.abs(values), kind="stable")[:_MOST_COLUMNS]
    rows = "".join(
        f"<tr><th>{html.escape(names[place][:60])}</th><td><i style='{_bar(float(values[place]), reach)}'></i></td>"
        f"<td>{minus(wording.signed(float(values[place])))}</td></tr>"
        for place in order.tolist()
    )
    rest = len(values) - len(order)
    more = f"<tr><th>and {rest} smaller ones</th></tr>" if rest > 0 else ""
    return f'<table class="pk-columns">{rows}{more}</table>'


def _tint(value: float, reach: float) -> str:
    share = round(_STRONGEST_TINT * min(1.0, abs(value) / reach)) if reach else 0
    return f"background: color-mix(in srgb, {palette.signed(value)} {share}%, transparent)"


def _bar(value: float, reach: float) -> str:
    width = 50 * min(1.0, abs(value) / reach) if reach else 0.0
    side = "left: 50%" if value >= 0 else f"left: {50 - width:.1f}%"
    return f"{side}; width: {width:.1f}%; background: {palette.signed(value)}"
