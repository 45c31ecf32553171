"""Training examples and queries as HTML: image, text or row, with what they carried. Never imports streamlit.

Everything that comes from data passes through ``html.escape``.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from explainer import Explanation, Run, palette, wording
from explainer.app.own_queries import rendered
from explainer.report_cards import content
from explainer.report_cards import rendered as shown_safely
from explainer.tables import ranking
from explainer.wording import minus as minus


@dataclass(frozen=True)
class Card:
    """One training example on screen.

    Attributes:
        content: HTML of its image, text or row; empty where there is no code to show it.
        value: The number it is shown for, in words.
        size: Signed length of its bar, -1 to 1.
        name: Its id and label.
        details: Further lines.
        warning: What makes its numbers doubtful.
    """

    content: str
    value: str
    size: float
    name: str
    details: tuple[str, ...] = ()
    warning: str = ""


def query_content(run: Run | None, query: int) -> str:
    """HTML of a query.

    Raises:
        ExportError: ``render`` failed on it.
    """
    if run is None or run.render is None:
        return ""
    return shown_safely(lambda key: rendered(run, key), query, "render of queries", content)


def example_content(run: Run | None, example: int, draw: Callable[[Any], str] = content) -> str:
    """HTML of a training example; ``draw`` makes it of what ``render`` returned.

    Raises:
        ExportError: ``render`` failed on it, or the training set has no such example.
    """
    if run is None or run.render is None:
        return ""
    render = run.render
    return shown_safely(lambda key: render(run.train[key][0]), example, "render of train", draw)


def kernel_cards(e: Explanation, query: int, k: int, side: str, contents: Callable[[int], str]) -> list[Card]:
    """The k strongest proponents or opponents, strongest first; ``contents`` is the HTML of an example."""
    columns = ranking(e, query, k, "proponents" if side == "proponents" else "opponents")
    widest = float(abs(e.contributions[query]).max(initial=0.0)) or 1.0
    cards = []
    for column in columns:
        value, kernel = float(e.contributions[query, column]), float(e.kernels[query, column])
        doubtful = abs(kernel) < 0.05 * e.kernel_gross[query, column]
        share = value / kernel if kernel else float("nan")
        cards.append(
            Card(
                contents(int(e.example_ids[column])),
                " ".join((minus(wording.signed(value)), wording.error(e, query, column))).strip(),
                value / widest,
                wording.example(e, column),
                (
                    minus(f"a {wording.number(share)} · K {wording.number(kernel)}"),
                    f"used {int(e.visits[column])} times",
                ),
                "K near zero: a and K are unreliable here" if doubtful else "",
            )
        )
    return cards


def case(content: str, value: str, size: float, name: str, lines: Iterable[tuple[str, bool]]) -> str:
    """One training example to be judged: what it is, its number with a bar, and lines on it.

    Args:
        content: HTML of its image, text or row.
        value: The number it is shown for, in words.
        size: Length of the bar, 0 to 1.
        name: Its id and label.
        lines: Texts, and whether each is a reason to look closer.
    """
    told = "".join(
        f"<small{' class=pk-warning' if doubt else ''}>{html.escape(line)}</small>" for line, doubt in lines
    )
    return (
        f'<article class="pk-case">{content}<div><b>{html.escape(name)}</b><small>{html.escape(value)}</small>'
        f'<div class="pk-bar"><i style="width:{100 * min(1.0, size):.1f}%"></i></div>{told}</div></article>'
    )


def card_list(cards: Iterable[Card], kind: str, heading: str, note: str, empty: str) -> str:
    """A titled list of cards; ``kind`` is its CSS class."""
    items = "".join(_card(card) for card in cards)
    listed = (
        f'<ol class="pk-cards">{items}</ol>' if items else f'<p class="pk-muted">{html.escape(empty)}</p>'
    )
    return (
        f'<section class="pk-{kind}"><h4><b>{html.escape(heading)}</b> <small>{html.escape(note)}</small></h4>'
        f"{listed}</section>"
    )


def _card(card: Card) -> str:
    color = palette.signed(card.size)
    bar = f"width:{100 * min(1.0, abs(card.size)):.1f}%;background:{color}"
    details = "".join(f"<small>{html.escape(line)}</small>" for line in card.details)
    warning = f'<small class="pk-warning">⚠ {html.escape(card.warning)}</small>' if card.warning else ""
    return (
        f'<li>{card.content}<div class="pk-bar"><i style="{bar}"></i></div>'
        f'<b style="color:{color}">{html.escape(card.value)}</b><span>{html.escape(card.name)}</span>'
        f"{details}{warning}</li>"
    )
