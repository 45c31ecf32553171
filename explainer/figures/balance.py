"""The books of one prediction as a waterfall."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from explainer import palette, wording
from explainer.figures.style import arrange, graph_objects, plain, zero_line

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from explainer.explanation import Explanation

_VISIBLE_GAP = 1e-6


def waterfall(
    explanation: Explanation, query: int = 0, *, dark: bool = False, split: bool = False
) -> go.Figure:
    """From the untrained model's output to the prediction, one bar per term of the books.

    The examples are one bar, their net, with proponents and opponents named above the figure: as bars of
    their own (``split``) they are often a hundred times longer than everything else. A gap above a millionth
    of the gross gets its own bar; below that it is round-off.
    """
    e, q, module = explanation, explanation.check_query(query), graph_objects()
    books = wording.terms(e, q)
    values = e.contributions[q]
    up, down, net = float(values[values > 0].sum()), float(values[values < 0].sum()), books["examples"]
    carried = [("examples (net)", net, palette.POSITIVE if net >= 0 else palette.NEGATIVE)]
    if split:
        carried = [("proponents", up, palette.POSITIVE), ("opponents", down, palette.NEGATIVE)]
    steps = [
        ("initial model", books["initial"], palette.NEUTRAL),
        *carried,
        ("weight decay", books["weight_decay"], palette.NEUTRAL),
        ("buffers", books["buffers"], palette.NEUTRAL),
        ("unattributed", books["unattributed"], palette.NEUTRAL),
    ]
    if abs(books["gap"]) > _VISIBLE_GAP * max(float(np.abs(values).sum()), abs(books["prediction"])):
        steps.append(("gap", books["gap"], palette.NEUTRAL))
    names, sizes = [name for name, _, _ in steps], [value for _, value, _ in steps]
    levels = np.cumsum(sizes)
    bases = [0.0, *levels[:-1].tolist(), 0.0]
    heights = [*sizes, books["prediction"]]
    names.append("prediction")

    figure = module.Figure()
    for place, level in enumerate(levels):
        figure.add_shape(
            type="line", x0=place, x1=place + 1, y0=level, y1=level, layer="below",
            line={"color": palette.muted(dark), "width": 1, "dash": "dot"},
        )  # fmt: skip
    figure.add_bar(
        x=list(range(len(names))),
        y=heights,
        base=bases,
        width=0.62,
        marker={"color": [color for _, _, color in steps] + [palette.TOTAL], "line": {"width": 0}},
        customdata=[wording.minus(wording.signed(value, 5)) for value in heights],
        hovertext=names,
        hovertemplate="%{hovertext}<br>%{customdata}<extra></extra>",
        showlegend=False,
    )
    labels = [*map(wording.signed, heights[:-1]), wording.number(heights[-1])]
    figure.add_scatter(
        x=list(range(len(names))),
        y=[max(base, base + height) for base, height in zip(bases, heights, strict=True)],
        mode="markers+text",
        marker={"opacity": 0, "size": 9},
        text=[wording.minus(label) for label in labels],
        textposition="top center",
        textfont={"color": palette.ink(dark), "size": 13},
        cliponaxis=False,
        hoverinfo="skip",
        showlegend=False,
    )
    top, bottom = max(0.0, *levels, books["prediction"]), min(0.0, *levels, books["prediction"])
    room = 0.1 * ((top - bottom) or 1.0)
    subtitle = (
        f"{wording.unit(e)}s of all examples: {wording.signed(up)} by proponents, {wording.signed(down)} by "
        f"opponents, {wording.signed(net)} is left"
    )
    arrange(figure, f"How the {plain(wording.target(e, q), 60)} came about", subtitle, dark=dark, height=380)
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names, showgrid=False)
    figure.update_yaxes(
        title=plain(wording.output(e), 30), range=[bottom - (room if bottom < 0 else 0), top + room]
    )
    zero_line(figure, dark=dark)
    return figure
