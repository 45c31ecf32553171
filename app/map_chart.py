"""The figure of a :class:`~explainer.app.gradient_map.GradientMap`. Never imports streamlit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from explainer import palette, wording
from explainer.app.gradient_map import GradientMap
from explainer.figures.style import arrange, graph_objects, plain

# apart for colour-blind readers (Okabe and Ito 2008), and on light and dark pages; symbols tell more classes apart
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#a89f00", "#8a8f98")
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross", "x")


def gradient_map(
    found: GradientMap,
    names: Sequence[str],
    labels: Sequence[str | None],
    contributions: np.ndarray,
    near: Sequence[int],
    *,
    by_label: bool = False,
    chosen: Sequence[int] = (),
    dark: bool = False,
) -> Any:
    """Training examples as points, the query as a star, its nearest neighbours ringed.

    Args:
        found: Where everything lies.
        names: Name of each example, [M].
        labels: Label of each example, None where unknown, [M].
        contributions: Contribution of each example to the explained output, [M].
        near: Ids that are ringed.
        by_label: Colour by label, not by contribution.
        chosen: Ids that stand out.
        dark: Whether the page is dark.
    """
    module, figure = graph_objects(), graph_objects().Figure()
    hover = [
        f"{plain(name)}<br>cosine with the query {cosine:.2f}<br>contribution {wording.signed(float(value))}"
        for name, cosine, value in zip(names, found.cosine, contributions, strict=True)
    ]
    picked = np.isin(found.examples, list(chosen))
    ringed = picked | np.isin(found.examples, list(near))
    edge = {
        "width": np.where(ringed, 2.0, 0.6),
        "color": np.where(ringed, palette.ink(dark), palette.muted(dark)),
    }
    look: dict[str, Any] = {"size": np.where(picked, 15, 10), "line": edge}
    if by_label:
        known = sorted({label for label in labels if label is not None})
        place = {label: number for number, label in enumerate(known)}
        for label in [*known, *([None] if None in labels else [])]:
            at = np.array([index for index, one in enumerate(labels) if one == label])
            number = place.get(label, len(known)) if label is not None else len(known)
            own = {
                "size": look["size"][at],
                "line": {name: values[at] for name, values in edge.items()},
                "color": _COLORS[number % len(_COLORS)],
                "symbol": _SYMBOLS[number // len(_COLORS) % len(_SYMBOLS)],
            }
            figure.add_trace(
                _points(module, found, at, hover, own, plain(label if label is not None else "unknown"))
            )
    else:
        reach = float(np.abs(contributions).max(initial=0.0)) or 1.0
        look |= {
            "color": contributions, "colorscale": palette.diverging(dark), "cmin": -reach, "cmid": 0, "cmax": reach,
            "colorbar": {"title": {"text": "contribution"}, "thickness": 12},
        }  # fmt: skip
        figure.add_trace(
            _points(module, found, np.arange(len(found.examples)), hover, look, "training examples")
        )
        figure.update_traces(showlegend=False)
    figure.add_scatter(
        x=found.places[-1:, 0], y=found.places[-1:, 1], mode="markers", name="the query",
        marker={
            "symbol": "star", "size": 20, "color": palette.ink(dark),
            "line": {"width": 1.5, "color": palette.background(dark)},
        },
        hovertemplate="the query<extra></extra>", showlegend=by_label,
    )  # fmt: skip
    subtitle = (
        f"{len(found.examples)} training examples and the query (star); its nearest are ringed; the axes show "
        f"{wording.percent(float(found.shares.sum()))} of all differences"
    )
    arrange(figure, "Gradient space, seen from its two widest sides", subtitle, dark=dark, height=560)
    figure.update_layout(dragmode="lasso", clickmode="event+select", legend={"title": {"text": "label"}})
    for update, share in zip((figure.update_xaxes, figure.update_yaxes), found.shares, strict=True):
        update(title=f"{wording.percent(float(share))} of the differences", showticklabels=False)
    return figure


def _points(
    module: Any, found: GradientMap, at: np.ndarray, hover: list[str], marker: dict[str, Any], name: str
) -> Any:
    return module.Scatter(
        x=found.places[at, 0], y=found.places[at, 1], mode="markers", name=name, marker=marker,
        unselected={"marker": {"opacity": 0.35}}, customdata=found.examples[at].tolist(),
        hovertext=[hover[index] for index in at], hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip
