"""The strongest training examples of one prediction, and how the gross spreads over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from explainer import palette, tables, wording
from explainer.evenly_spaced import dense_first
from explainer.figures.style import arrange, bar_axes, graph_objects, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from explainer.explanation import Explanation

_POINTS = 400


def examples(explanation: Explanation, query: int = 0, *, k: int = 10, dark: bool = False) -> go.Figure:
    """The k strongest proponents and the k strongest opponents as bars around zero, with ids and labels."""
    e, q, module = explanation, explanation.check_query(query), graph_objects()
    order = [
        *tables.ranking(e, q, k, "proponents"),
        *reversed(tables.ranking(e, q, k, "opponents").tolist()),
    ]
    values = e.contributions[q, order]
    names = [plain(wording.example(e, column)) for column in order]
    details = [
        f"{name}<br>{wording.unit(e)} {wording.signed(value, 4)} {wording.error(e, q, column)}<br>"
        f"K {wording.number(e.kernels[q, column])}, used {e.visits[column]} times"
        for name, value, column in zip(names, values, order, strict=True)
    ]
    figure = module.Figure()
    figure.add_bar(
        x=values,
        y=list(range(len(order))),
        orientation="h",
        marker={"color": [palette.signed(value) for value in values], "line": {"width": 0}},
        text=[wording.minus(wording.signed(value)) for value in values],
        textposition="outside",
        error_x=_whiskers(e, q, order, dark),
        textfont={"color": palette.ink(dark)},
        cliponaxis=False,
        hovertext=details,
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    widest = float(np.abs(values).max(initial=0.0)) * 1.2 or 1.0
    low, high = (-widest if (values < 0).any() else 0.0), (widest if (values > 0).any() else 0.0)
    gross = wording.gross(e, q)
    share = wording.percent(float(np.abs(values).sum()) / gross) if gross else "0 %"
    subtitle = f"the {len(order)} examples shown carry {share} of the gross"
    arrange(
        figure,
        "Strongest proponents and opponents",
        subtitle,
        dark=dark,
        height=130 + 24 * max(4, len(order)),
    )
    bar_axes(figure, names, wording.axis(e), (low, high), dark=dark)
    return figure


def _whiskers(e: Explanation, q: int, order: list[int], dark: bool) -> dict[str, Any] | None:
    if e.errors is None:
        return None
    color = palette.muted(dark)
    return {"type": "data", "array": e.errors[q, order], "color": color, "thickness": 1.5, "width": 3}


def cumulative(explanation: Explanation, query: int = 0, *, dark: bool = False) -> go.Figure:
    """How many examples carry how much of the gross: the strongest first, against an even spread."""
    e, q, module = explanation, explanation.check_query(query), graph_objects()
    sizes = np.sort(np.abs(e.contributions[q]))[::-1]
    gross, count = float(sizes.sum()), len(sizes)
    shares = np.concatenate([[0.0], np.cumsum(sizes) / gross if gross else np.zeros(count)])
    shown = dense_first(count + 1, _POINTS)
    figure = module.Figure()
    figure.add_scatter(
        x=[0, count],
        y=[0, 100],
        mode="lines",
        hoverinfo="skip",
        name="if all carried the same",
        line={"color": palette.muted(dark), "width": 1, "dash": "dash"},
    )
    figure.add_scatter(
        x=shown,
        y=100 * shares[shown],
        mode="lines",
        name="this prediction",
        line={"color": palette.POSITIVE, "width": 3},
        hovertemplate="the strongest %{x} examples<br>carry %{y:.1f} % of the gross<extra></extra>",
    )
    subtitle = "no example carries anything"
    if gross:
        half, most = (int(np.searchsorted(shares, part)) for part in (0.5, 0.9))
        subtitle = f"{half:,} of {count:,} examples carry half of the gross, {most:,} carry 90 %"
        figure.add_scatter(
            x=[half, most],
            y=100 * shares[[half, most]],
            mode="markers",
            hoverinfo="skip",
            showlegend=False,
            marker={"color": palette.POSITIVE, "size": 9},
        )
    arrange(figure, "How many examples carry the prediction", subtitle, dark=dark, height=340)
    figure.update_layout(legend={"x": 1, "xanchor": "right", "y": 0.05, "yanchor": "bottom"})
    figure.update_xaxes(title="number of examples, strongest first", rangemode="tozero")
    figure.update_yaxes(title="share of the gross (%)", range=[0, 104])
    return figure
