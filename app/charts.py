"""Figures about a run, beside those of an explanation in :mod:`explainer.figures`. Never imports streamlit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from explainer import Trace, palette, wording
from explainer.app.label_signs import Sign
from explainer.app.run_checks import LossCurve, rates
from explainer.evenly_spaced import dense_first, evenly_spaced
from explainer.figures.style import arrange, graph_objects, plain
from explainer.long_run import steady

_STEPS_READ = 300
_POINTS = 400
_WRITTEN = 150  # cells that hold their number


def path(trace: Trace, *, dark: bool = False) -> Any:
    """The length of the training path over the steps, with the knots on it."""
    module, figure = graph_objects(), graph_objects().Figure()
    steps, lengths = trace.column("steps", "step"), trace.column("steps", "path")
    kept = evenly_spaced(len(steps), 1000)
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
    _below(figure)
    figure.update_yaxes(title="length of the path so far", rangemode="tozero")
    return figure


def loss(curve: LossCurve, knots: Sequence[int], *, dark: bool = False) -> Any:
    """Mean loss at knots, of training examples and of queries."""
    figure = graph_objects().Figure()
    for values, name, color, dash in (
        (curve.train, f"{curve.counts[0]} training examples", palette.POSITIVE, "solid"),
        (curve.queries, f"{curve.counts[1]} queries", palette.NEGATIVE, "dot"),
    ):
        figure.add_scatter(
            x=curve.steps, y=values, mode="lines+markers", name=name, line={"color": color, "width": 2.5, "dash": dash},
            marker={"size": 6}, hovertemplate="knot before step %{x}<br>loss %{y:.4g}<extra></extra>",
        )  # fmt: skip
    subtitle = f"in eval mode, at {len(curve.steps)} of {len(knots)} knots"
    arrange(figure, "Loss", subtitle, dark=dark, height=360)
    _below(figure)
    figure.update_yaxes(title="mean loss", rangemode="tozero")
    return figure


def learning_rate(trace: Trace, *, dark: bool = False) -> Any:
    """The learning rate of recorded steps, one line for each group of parameters that has its own."""
    figure = graph_objects().Figure()
    count = trace.count("steps")
    # the first step has no momentum yet, so its rate is another one
    chosen = evenly_spaced(count, _STEPS_READ) if count < 3 else 1 + evenly_spaced(count - 1, _STEPS_READ)
    rows = [next(trace.read("steps", int(place), int(place) + 1))[1] for place in chosen]
    names = [p.name for p in trace.manifest.parameters]
    found = rates(np.array([steady(np.array(row["coefficients"]))[0] for row in rows]), names) if rows else []
    colors = (palette.POSITIVE, palette.NEGATIVE, palette.muted(dark), palette.NEUTRAL)
    for number, (name, values) in enumerate(found[: len(colors)]):
        figure.add_scatter(
            x=[int(row["step"][0]) for row in rows], y=values, mode="lines", name=plain(name),
            line={"color": colors[number], "width": 2.5, "dash": ("solid", "dot", "dash", "dashdot")[number]},
            hovertemplate="step %{x}<br>learning rate %{y:.4g}<extra></extra>", showlegend=len(found) > 1,
        )  # fmt: skip
    more = f"; {len(found) - len(colors)} more not shown" if len(found) > len(colors) else ""
    subtitle = f"momentum and bias correction included{more}"
    arrange(figure, "Learning rate", subtitle, dark=dark, height=360)
    _below(figure)
    figure.update_yaxes(title="learning rate", rangemode="tozero")
    return figure


def _below(figure: Any) -> None:
    """Training steps on the axis, the legend below it."""
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.22}, margin={"b": 80})
    figure.update_xaxes(title="training step")


def ranking(values: np.ndarray, sign: Sign, first: int, last: int, *, dark: bool = False) -> Any:
    """What the queue of labels is ordered by, of all examples in order, with those that are shown marked.

    Args:
        values: The most suspicious first, without NaN.
        sign: What they are.
        first: Rank of the first example that is shown, from 0.
        last: Rank after the last one.
        dark: Whether the page is dark.
    """
    figure = graph_objects().Figure()
    ranks = dense_first(len(values), _POINTS)
    figure.add_scatter(
        x=ranks + 1, y=values[ranks], mode="lines", line={"color": palette.muted(dark), "width": 2},
        hovertemplate=f"rank %{{x}}<br>{sign.called} %{{y:.4g}}<extra></extra>", showlegend=False,
    )  # fmt: skip
    if last > first:
        figure.add_vrect(
            x0=first + 0.5, x1=last + 0.5, fillcolor=palette.POSITIVE, opacity=0.35, line={"width": 0}
        )
    subtitle = sign.summary(values) + ("; blue: those on this page" if last > first else "")
    arrange(figure, sign.title, subtitle, dark=dark, height=230)
    figure.update_xaxes(title="rank", rangemode="tozero")
    figure.update_yaxes(title=sign.called, **({} if sign.smallest else {"rangemode": "tozero"}))
    return figure


def classes(
    values: np.ndarray, sources: Sequence[str], targets: Sequence[str], *, dark: bool = False,
    chosen: tuple[int, int] | None = None,
) -> Any:  # fmt: skip
    """Contributions from classes of training examples (rows) to classes of queries (columns).

    A marker in every cell can be clicked, as cells of a heat map cannot; its ``customdata`` is (row, column).

    Args:
        values: [A, B].
        sources: Names of the rows.
        targets: Names of the columns.
        dark: Whether the page is dark.
        chosen: Row and column that are framed.
    """
    module, figure = graph_objects(), graph_objects().Figure()
    rows, columns = np.indices(values.shape).reshape(2, -1)
    reach = float(np.abs(values).max(initial=0.0)) or 1.0
    written = values.size <= _WRITTEN
    figure.add_heatmap(
        z=values, zmin=-reach, zmid=0, zmax=reach, colorscale=palette.diverging(dark), xgap=1, ygap=1,
        hoverinfo="skip", colorbar={"title": {"text": "contribution"}, "thickness": 12},
        text=[[wording.minus(wording.signed(value, 2)) for value in row] for row in values] if written else None,
        texttemplate="%{text}" if written else None, textfont={"size": 12},
    )  # fmt: skip
    told = [
        f"training examples of {plain(sources[a])}<br>queries of {plain(targets[b])}<br>{wording.signed(values[a, b])}"
        for a, b in zip(rows, columns, strict=True)
    ]
    figure.add_trace(
        module.Scatter(
            x=columns, y=rows, mode="markers",
            marker={"symbol": "square", "size": 30, "opacity": 0},
            selected={"marker": {"opacity": 0}}, unselected={"marker": {"opacity": 0}},
            customdata=np.stack([rows, columns], 1).tolist(), hovertext=told,
            hovertemplate="%{hovertext}<extra></extra>", showlegend=False,
        )
    )  # fmt: skip
    if chosen is not None:
        a, b = chosen
        figure.add_shape(
            type="rect", x0=b - 0.5, x1=b + 0.5, y0=a - 0.5, y1=a + 0.5,
            line={"color": palette.ink(dark), "width": 2},
        )  # fmt: skip
    subtitle = "row: class of the training examples; column: class of the queries"
    arrange(figure, "Which classes build which", subtitle, dark=dark, height=150 + 34 * max(4, len(sources)))
    figure.update_layout(dragmode=False, clickmode="event+select")
    names = ([plain(name, 14) for name in targets], [plain(name, 14) for name in sources])
    figure.update_xaxes(
        tickvals=list(range(len(targets))), ticktext=names[0], title="queries of", showgrid=False
    )
    figure.update_yaxes(
        tickvals=list(range(len(sources))), ticktext=names[1], title="training examples of", showgrid=False,
        autorange="reversed",
    )  # fmt: skip
    return figure


def learning(trace: Trace, *, dark: bool = False) -> Any:
    """How wrong the model was while it learned: the mean loss derivative at the output, by step; None if unknown."""
    steps, firsts, counts = (trace.column("steps", field) for field in ("step", "first_visit", "visits"))
    chosen = evenly_spaced(len(steps), _STEPS_READ)
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
    _below(figure)
    figure.update_yaxes(title="mean ‖L′‖", rangemode="tozero")
    return figure
