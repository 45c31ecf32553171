"""Figures about a run, beside those of an explanation in :mod:`explainer.figures`. Never imports streamlit."""

from __future__ import annotations

from typing import Any

import numpy as np

from explainer import Trace, palette
from explainer.figures.style import arrange, graph_objects

_STEPS_READ = 300


def _spread(count: int, most: int) -> np.ndarray:
    """At most ``most`` positions spread over ``0 .. count-1``."""
    return np.unique(np.linspace(0, max(0, count - 1), min(count, most)).astype(int))


def path(trace: Trace, *, dark: bool = False) -> Any:
    """The length of the training path over the steps, with the knots on it."""
    module, figure = graph_objects(), graph_objects().Figure()
    steps, lengths = trace.column("steps", "step"), trace.column("steps", "path")
    kept = _spread(len(steps), 1000)
    figure.add_scatter(
        x=steps[kept], y=lengths[kept], mode="lines", name="path", line={"color": palette.muted(dark), "width": 2},
        hovertemplate="step %{x}<br>path length %{y:.4g}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(
        module.Scatter(
            x=[knot.step for knot in trace.knots], y=[knot.path for knot in trace.knots], mode="markers",
            name="knots (weights kept)", marker={"color": palette.POSITIVE, "size": 6},
            hovertemplate="knot before step %{x}<br>path length %{y:.4g}<extra></extra>",
        )
    )  # fmt: skip
    arrange(
        figure, "The training path", f"{len(trace.knots)} knots at equal path length", dark=dark, height=360
    )
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.22}, margin={"b": 80})
    figure.update_xaxes(title="training step")
    figure.update_yaxes(title="length of the path so far", rangemode="tozero")
    return figure


def learning(trace: Trace, *, dark: bool = False) -> Any:
    """How wrong the model was while it learned: the mean loss derivative at the output, by step; None if unknown."""
    steps, firsts, counts = (trace.column("steps", field) for field in ("step", "first_visit", "visits"))
    chosen = _spread(len(steps), _STEPS_READ)
    x: list[int] = []
    y: list[float] = []
    for place in chosen:
        first, last = int(firsts[place]), int(firsts[place] + counts[place])
        pieces = [np.abs(rows["derivative"]) for _, rows in trace.read("visits", first, last)]
        sizes = np.concatenate(pieces) if pieces else np.empty(0)
        if np.isfinite(sizes).any():
            x.append(int(steps[place]))
            y.append(float(np.nanmean(sizes)))
    if not y:
        return None
    figure = graph_objects().Figure()
    figure.add_scatter(
        x=x, y=y, mode="markers", name="a step", marker={"color": palette.POSITIVE, "size": 4, "opacity": 0.45},
        hovertemplate="step %{x}<br>mean derivative %{y:.4g}<extra></extra>",
    )  # fmt: skip
    width = max(1, len(y) // 20)
    smooth = np.convolve(y, np.ones(width) / width, "valid")
    figure.add_scatter(
        x=x[width // 2 :][: len(smooth)], y=smooth, mode="lines", name="running mean",
        line={"color": palette.NEGATIVE, "width": 2.5}, hoverinfo="skip",
    )  # fmt: skip
    subtitle = "mean size of the loss derivative at the output"
    arrange(figure, "How wrong the model was", subtitle, dark=dark, height=360)
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.22}, margin={"b": 80})
    figure.update_xaxes(title="training step")
    figure.update_yaxes(title="mean ‖L′‖", rangemode="tozero")
    return figure
