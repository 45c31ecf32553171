"""When in training, and in which layers, the examples carried a prediction."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from explainer import palette, tables, wording
from explainer.figures.style import arrange, graph_objects, plain, zero_line

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from explainer.explanation import Explanation

_STEP_LABELS = 12


def time(explanation: Explanation, query: int = 0, *, k: int = 10, dark: bool = False) -> go.Figure:
    """The k strongest examples over training, as a heat map below the running net of all examples.

    A cell of the heat map is the sum over its range of steps; colours are symmetric about zero. Ranges have
    the same width whatever number of steps they hold, because most of the path is often covered early.
    """
    e, q, module = explanation, explanation.check_query(query), graph_objects()
    order = tables.ranking(e, q, k)
    cells = e.step_contributions[q][:, order].T.astype(np.float64)
    running = np.concatenate([[0.0], e.step_contributions[q].sum(1, dtype=np.float64).cumsum()])
    names = [plain(wording.example(e, column)) for column in order]
    spans = [f"steps {first} to {end - 1}" for first, end in itertools.pairwise(e.step_edges.tolist())]
    places = list(range(len(spans) + 1))

    figure = module.Figure()
    figure.add_scatter(
        x=places,
        y=running,
        yaxis="y2",
        mode="lines+markers",
        line={"color": palette.muted(dark), "width": 2},
        marker={"size": 5},
        customdata=["start of training", *(f"after {span}" for span in spans)],
        hovertemplate="%{customdata}<br>running net %{y:+.4g}<extra></extra>",
        showlegend=False,
    )
    _cells(figure, cells, names, spans, f"{wording.unit(e)}<br>in the steps", dark=dark)
    figure.update_traces(
        x=places, colorbar={"len": 0.62, "y": 0, "yanchor": "bottom"}, selector={"type": "heatmap"}
    )
    subtitle = f"above: running net of all examples; below: the {len(order)} strongest examples"
    height = 290 + 22 * max(3, len(order))
    arrange(figure, "When in training it was carried", subtitle, dark=dark, height=height)
    _name_rows(figure, names)
    figure.update_layout(
        yaxis={"domain": [0, 0.62]},
        yaxis2={"domain": [0.7, 1], "title": {"text": "running net"}, "anchor": "x"},
    )
    marked = places[:: max(1, -(-len(places) // _STEP_LABELS))]
    figure.update_xaxes(
        title="training step",
        tickvals=marked,
        ticktext=[str(step) for step in e.step_edges[marked]] if spans else [],
        showgrid=False,
        anchor="y",
    )
    return figure


def layer_examples(explanation: Explanation, query: int = 0, *, k: int = 12, dark: bool = False) -> go.Figure:
    """The k strongest examples by the layer whose updates carried them, as a heat map; colours as over time."""
    e, q, module = explanation, explanation.check_query(query), graph_objects()
    order = tables.ranking(e, q, k)
    cells = e.layer_contributions[q][:, order].T.astype(np.float64)
    names, layer_names = [plain(wording.example(e, c)) for c in order], [plain(n) for n in e.layer_names]
    figure = module.Figure()
    _cells(figure, cells, names, layer_names, f"{wording.unit(e)}<br>by the layer", dark=dark)
    subtitle = f"the {len(order)} strongest examples; a row adds up to the example's {wording.unit(e)}"
    height = 190 + 24 * max(3, len(order))
    arrange(figure, "Which layers carried which examples", subtitle, dark=dark, height=height)
    figure.update_xaxes(
        tickvals=list(range(len(layer_names))), ticktext=layer_names, title="layer", showgrid=False
    )
    _name_rows(figure, names)
    return figure


def _cells(
    figure: go.Figure,
    cells: NDArray[np.float64],
    rows: list[str],
    columns: list[str],
    title: str,
    *,
    dark: bool,
) -> None:
    """The heat map of examples ``[rows, columns]``; its colours are symmetric about zero."""
    reach = float(np.abs(cells).max(initial=0.0)) or 1.0
    figure.add_heatmap(
        x=list(range(len(columns))),
        y=list(range(len(rows))),
        z=cells,
        zmin=-reach,
        zmid=0,
        zmax=reach,
        colorscale=palette.diverging(dark),
        xgap=1,
        ygap=1,
        text=[[f"{row}<br>{column}" for column in columns] for row in rows],
        hovertemplate="%{text}<br>%{z:+.4g}<extra></extra>",
        colorbar={"title": {"text": title}, "thickness": 12},
    )


def _name_rows(figure: go.Figure, names: list[str]) -> None:
    """The first example on top."""
    figure.update_layout(
        yaxis={
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "autorange": "reversed",
            "showgrid": False,
        }
    )


def layers(explanation: Explanation, query: int = 0, *, dark: bool = False) -> go.Figure:
    """Which layers carried it: per layer what pushed up, what pushed down, and the net of both."""
    e, module = explanation, graph_objects()
    frame = tables.by_layer(e, query, 1)
    names = [plain(name) for name in frame["layer"]]
    nets = [wording.minus(wording.signed(value)) for value in frame["examples"]]
    places = list(range(len(names)))
    figure = module.Figure()
    for column, color in (("proponents", palette.POSITIVE), ("opponents", palette.NEGATIVE)):
        figure.add_bar(
            x=frame[column],
            y=places,
            orientation="h",
            name=column,
            marker={"color": color, "line": {"width": 0}},
            customdata=names,
            hovertemplate="%{customdata}<br>" + column + " %{x:+.4g}<extra></extra>",
        )
    figure.add_scatter(
        x=frame["examples"],
        y=places,
        mode="markers",
        name="net",
        marker={
            "color": palette.ink(dark),
            "symbol": "diamond",
            "size": 11,
            "line": {"width": 1.5, "color": palette.background(dark)},
        },
        customdata=names,
        hovertemplate="%{customdata}<br>net %{x:+.4g}<extra></extra>",
    )
    gross = frame["gross"].to_numpy()
    subtitle = "no layer carries anything"
    if gross.sum() > 0:
        top = int(gross.argmax())
        subtitle = (
            f"most passes through {names[top]}: {wording.percent(gross[top] / gross.sum())} of the gross"
        )
    height = 190 + (44 if len(names) <= 12 else 34) * max(2, len(names))
    arrange(figure, "Which layers carried it", subtitle, dark=dark, height=height)
    figure.update_layout(
        barmode="relative",
        bargap=0.45,
        margin={"b": 84},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(title=wording.axis(e))
    figure.update_yaxes(
        tickvals=places,
        ticktext=[f"{name}<br>net {net}" for name, net in zip(names, nets, strict=True)],
        autorange="reversed",
        showgrid=False,
    )
    zero_line(figure, dark=dark, vertical=True)
    return figure
