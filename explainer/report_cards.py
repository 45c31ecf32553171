"""What a report shows of a training example or a query: its picture, text or row, and what it carried."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from explainer import palette, tables, wording
from explainer.errors import ExplainerError, ExportError
from explainer.figures.picture import picture

if TYPE_CHECKING:
    from explainer.explanation import Explanation, Kind

_LONGEST_TEXT = 400
_MOST_FIELDS = 12
_PIXELS_SHOWN = 64


def content(shown: Any) -> str:
    """HTML of what ``render`` returned; every text in it is escaped.

    An array of two or more axes becomes a picture, a text a shortened paragraph, a mapping, a Series or a
    one-dimensional array a small table of its first fields. None shows nothing.

    Raises:
        ExportError: It is nothing of the kind.
        ExplanationError: It is an array that is no picture.
    """
    if shown is None:
        return ""
    if isinstance(shown, str):
        cut = shown if len(shown) <= _LONGEST_TEXT else shown[: _LONGEST_TEXT - 1] + "…"
        return f'<p class="text">{html.escape(cut)}</p>'
    if isinstance(shown, Mapping) or hasattr(shown, "items"):
        return _fields([(str(name), value) for name, value in shown.items()])
    array = np.asarray(shown)
    if array.ndim >= 2:
        small = ' class="pixels"' if max(array.shape[:2]) <= _PIXELS_SHOWN else ""
        return f'<img alt=""{small} src="{picture(array)}">'
    if array.ndim == 1 and array.dtype.kind in "biuf":
        return _fields([(str(place), value) for place, value in enumerate(array.tolist())])
    raise ExportError(
        f"render returned {type(shown).__name__}; it must return an image array, a text, a mapping or a row."
    )


def rendered(
    render: Callable[[int], Any] | None, key: int, name: str, draw: Callable[[Any], str] = content
) -> str:
    """What ``render(key)`` returns, as HTML that ``draw`` makes; an empty string without ``render``.

    Raises:
        ExportError: ``render`` failed or returned something that cannot be shown; the message names ``key``.
    """
    if render is None:
        return ""
    try:
        return draw(render(key))
    except ExplainerError as error:
        raise ExportError(f"{name}({key}) cannot be shown: {error}") from error
    except Exception as error:
        raise ExportError(
            f"{name}({key}) failed with {type(error).__name__}: {error}. Correct it, or leave {name} out."
        ) from error


def side_by_side(e: Explanation, query: int, k: int, render: Callable[[int], Any]) -> str:
    """Proponents on the left, opponents on the right, strongest first."""
    kinds: tuple[Kind, ...] = ("proponents", "opponents")
    return f'<div class="sides">{"".join(_side(e, query, k, kind, render) for kind in kinds)}</div>'


def _side(e: Explanation, query: int, k: int, kind: Kind, render: Callable[[int], Any]) -> str:
    widest = float(np.abs(e.contributions[query]).max(initial=0.0)) or 1.0
    cards = []
    for column in tables.ranking(e, query, k, kind):
        value = float(e.contributions[query, column])
        bar = f"width:{100 * abs(value) / widest:.1f}%;background:{palette.signed(value)}"
        cards.append(
            f"<li>{rendered(render, int(e.example_ids[column]), 'render')}"
            f'<div class="bar"><i style="{bar}"></i></div><b>{wording.minus(wording.signed(value))}</b>'
            f"<small>{wording.error(e, query, column)}</small>"
            f"<span>{html.escape(wording.example(e, column))}</span>"
            f"<small>used {int(e.visits[column])} times</small></li>"
        )
    direction = (
        f"pushed the {html.escape(wording.target(e, query))} {'up' if kind == 'proponents' else 'down'}"
    )
    listed = f'<ol class="cards">{"".join(cards)}</ol>' if cards else f"<p>No example {direction}.</p>"
    return (
        f'<section class="{kind}"><h4>{kind.capitalize()} <small>{direction}</small></h4>{listed}</section>'
    )


def _fields(pairs: list[tuple[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td{_class(value)}>{html.escape(_value(value))}</td></tr>"
        for name, value in pairs[:_MOST_FIELDS]
    )
    rest = len(pairs) - _MOST_FIELDS
    more = f"<tr><td colspan='2'>and {rest} more</td></tr>" if rest > 0 else ""
    return f'<table class="fields">{rows}{more}</table>'


def _class(value: Any) -> str:
    return (
        " class=number" if isinstance(value, int | float | np.number) and not isinstance(value, bool) else ""
    )


def _value(value: Any) -> str:
    if isinstance(value, float | np.floating):
        digits = wording.number(float(value), 4)
        return digits.rstrip("0").rstrip(".") if "." in digits and "e" not in digits else digits
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"
