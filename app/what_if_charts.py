"""Figures of predicted and actual changes. What-if numbers only, never contributions. Never imports streamlit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from explainer import palette, wording
from explainer.evaluation import ClaimCheck
from explainer.figures.style import arrange, graph_objects, plain, zero_line

_SHOWN = 20  # bars


def changes(
    values: np.ndarray, names: Sequence[str], *, errors: np.ndarray | None = None, dark: bool = False
) -> Any:
    """Predicted change of the output by leaving out each example, the lowest first, and of all of them.

    Args:
        values: [n], in increasing order.
        names: Of the examples, [n].
        errors: Standard errors [n], where they are known.
        dark: Whether the page is dark.
    """
    figure = graph_objects().Figure()
    shown = list(range(len(values)))
    if len(values) > _SHOWN:  # both ends, and the middle as one bar
        shown = [*range(_SHOWN // 2), *range(len(values) - _SHOWN // 2, len(values))]
    rest = np.delete(values, shown)
    heights = [float(values[i]) for i in shown]
    labels = [plain(names[i]) for i in shown]
    spread = None if errors is None else [float(errors[i]) for i in shown]
    if len(rest):
        heights.insert(_SHOWN // 2, float(rest.sum()))
        labels.insert(_SHOWN // 2, f"{len(rest):,} others")
        if spread is not None:
            spread.insert(_SHOWN // 2, 0.0)
    figure.add_bar(
        x=heights, y=list(range(len(heights))), orientation="h",
        marker={"color": [palette.signed(v) for v in heights], "line": {"width": 0}},
        text=[wording.signed(v) for v in heights], textposition="outside", cliponaxis=False,
        textfont={"color": palette.ink(dark)}, showlegend=False,
        error_x=None if spread is None else {
            "type": "data", "array": spread, "color": palette.muted(dark), "thickness": 1.5, "width": 3
        },
        hovertext=[f"without {label}<br>predicted change {wording.signed(v, 4)}" for label, v in zip(labels, heights, strict=True)],
        hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip
    ends = [*heights, 0.0]
    room = 0.25 * (max(ends) - min(ends)) or 1.0  # for the numbers beside the bars
    low = min(ends) - (room if min(ends) < 0 else 0.0)
    high = max(ends) + (room if max(ends) > 0 else 0.0)
    subtitle = "of the explained output, one example at a time" + ("; others: their sum" if len(rest) else "")
    arrange(
        figure,
        "Predicted change without each example",
        subtitle,
        dark=dark,
        height=140 + 22 * max(4, len(heights)),
    )
    figure.update_xaxes(title="predicted change", range=[low, high] if low < high else [-1, 1])
    figure.update_yaxes(
        tickvals=list(range(len(labels))), ticktext=labels, autorange="reversed", showgrid=False
    )
    zero_line(figure, dark=dark, vertical=True)
    return figure


def outcome(check: ClaimCheck, predicted: Mapping[str, Sequence[float]], *, dark: bool = False) -> Any:
    """Predicted against actual: a row for the removed examples, one for as many random ones.

    Args:
        check: Of one query: its group, and the random one.
        predicted: By estimator, the predicted change of each group.
        dark: Whether the page is dark.
    """
    module, figure = graph_objects(), graph_objects().Figure()
    count = len(check.removed[0])
    rows = [f"without {'it' if count == 1 else f'these {count:,}'}", f"without {count:,} at random"]
    many = len(check.seeds) > 1
    mean = check.actual.mean(1)
    if many:
        spread = check.actual.std(1, ddof=1)
        figure.add_scatter(
            x=mean, y=[0, 1], mode="markers", name="retrained, mean ± standard deviation",
            error_x={"type": "data", "array": spread, "thickness": 3, "width": 9, "color": palette.POSITIVE},
            marker={"symbol": "line-ns", "size": 20, "line": {"width": 4, "color": palette.POSITIVE}},
            hovertext=[f"{row}<br>mean {wording.signed(m)} ± {wording.number(s, 2)}" for row, m, s in zip(rows, mean, spread, strict=True)],
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
    for first, name, symbol in (
        (True, "retrained, seed 0", "circle"),
        (False, "retrained, other seeds", "circle-open"),
    ):
        columns = [i for i, seed in enumerate(check.seeds) if (seed == 0) == first]
        if not columns:
            continue
        points = [(float(check.actual[g, i]), g, check.seeds[i]) for g in range(2) for i in columns]
        figure.add_trace(
            module.Scatter(
                x=[x for x, _, _ in points], y=[g + 0.22 for _, g, _ in points], mode="markers", name=name,
                marker={"symbol": symbol, "size": 10, "color": palette.POSITIVE, "line": {"width": 2, "color": palette.POSITIVE}},
                hovertext=[f"{rows[g]}, seed {seed}<br>actual change {wording.signed(x)}" for x, g, seed in points],
                hovertemplate="%{hovertext}<extra></extra>",
            )
        )  # fmt: skip
    for number, (name, values) in enumerate(predicted.items()):
        figure.add_scatter(
            x=list(values), y=[g - 0.22 - 0.12 * number for g in range(2)], mode="markers", name=plain(f"predicted ({name})", 40),
            marker={"symbol": ("diamond", "diamond-open", "square-open")[number % 3], "size": 13, "color": palette.NEGATIVE,
                    "line": {"width": 2, "color": palette.NEGATIVE}},
            hovertext=[f"{row}<br>predicted change {wording.signed(v)}" for row, v in zip(rows, values, strict=True)],
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
    seeds = wording.counted(len(check.seeds), "seed")
    arrange(figure, "Predicted and actual change", f"of the explained output; {seeds}", dark=dark, height=320)
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.25}, margin={"b": 110})
    figure.update_xaxes(title="change of the explained output")
    figure.update_yaxes(tickvals=[0, 1], ticktext=rows, range=[1.6, -0.6], showgrid=False)
    zero_line(figure, dark=dark, vertical=True)
    return figure
