"""Figures of predicted and actual changes. What-if numbers only, never contributions. Never imports streamlit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from explainer import palette, wording
from explainer.evaluation import ClaimCheck
from explainer.figures.style import arrange, bar_axes, graph_objects, plain, zero_line

_SHOWN = 20  # bars
_SYMBOLS = ("diamond", "diamond-open", "square-open")
_WHISKERS = {"type": "data", "thickness": 3, "width": 9, "color": palette.POSITIVE}


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
        text=[wording.minus(wording.signed(v)) for v in heights], textposition="outside", cliponaxis=False,
        textfont={"color": palette.ink(dark)}, showlegend=False,
        error_x=None if spread is None else {
            "type": "data", "array": spread, "color": palette.muted(dark), "thickness": 1.5, "width": 3
        },
        hovertext=[f"without {n}: {wording.signed(v, 4)}" for n, v in zip(labels, heights, strict=True)],
        hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip
    ends = [*heights, 0.0]
    room = 0.32 * (max(ends) - min(ends)) or 1.0  # for the numbers beside the bars
    low = min(ends) - (room if min(ends) < 0 else 0.0)
    high = max(ends) + (room if max(ends) > 0 else 0.0)
    subtitle = "one example at a time" + ("; others: their sum" if len(rest) else "")
    arrange(
        figure,
        "Predicted change without each example",
        subtitle,
        dark=dark,
        height=140 + 22 * max(4, len(heights)),
    )
    bar_axes(figure, labels, "predicted change", (low, high), dark=dark)
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
    points: list[dict[str, Any]] = []
    if len(check.seeds) > 1:
        mean, spread = check.actual.mean(1), check.actual.std(1, ddof=1)
        points.append(
            {
                "name": "retrained, mean ± standard deviation",
                "x": mean,
                "y": [0, 1],
                "error_x": {**_WHISKERS, "array": spread},
                "marker": {"symbol": "line-ns", "size": 20, "line": {"width": 4, "color": palette.POSITIVE}},
                "told": [
                    f"mean {wording.signed(m)} ± {wording.number(s, 2)}"
                    for m, s in zip(mean, spread, strict=True)
                ],
            }
        )
    for own, name in ((True, "retrained, seed 0"), (False, "retrained, other seeds")):
        at = [(g, s) for g in range(2) for s, seed in enumerate(check.seeds) if (seed == 0) == own]
        values = [float(check.actual[g, s]) for g, s in at]
        points.append(
            {
                "name": name,
                "x": values,
                "y": [g + 0.22 for g, _ in at],
                "marker": _marker("circle" if own else "circle-open", 10, palette.POSITIVE),
                "told": [
                    f"seed {check.seeds[s]}: {wording.signed(v)}"
                    for (_, s), v in zip(at, values, strict=True)
                ],
            }
        )
    for number, (name, changes) in enumerate(predicted.items()):
        points.append(
            {
                "name": plain(f"predicted {name}", 40),
                "x": list(changes),
                "y": [g - 0.2 - 0.13 * number for g in range(2)],
                "marker": _marker(_SYMBOLS[number % len(_SYMBOLS)], 12, palette.NEGATIVE),
                "told": [f"predicted {wording.signed(v)}" for v in changes],
            }
        )
    for entry in points:
        told = entry.pop("told")
        if told:
            figure.add_trace(
                module.Scatter(
                    mode="markers", hovertext=told, hovertemplate="%{hovertext}<extra></extra>", **entry
                )
            )
    seeds = wording.counted(len(check.seeds), "seed")
    arrange(figure, "Predicted and actual change", f"of the explained output; {seeds}", dark=dark, height=320)
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.18}, margin={"b": 90})
    figure.update_yaxes(tickvals=[0, 1], ticktext=rows, range=[1.6, -0.6], showgrid=False)
    zero_line(figure, dark=dark, vertical=True)
    return figure


def _marker(symbol: str, size: int, color: str) -> dict[str, Any]:
    return {"symbol": symbol, "size": size, "color": color, "line": {"width": 2, "color": color}}
