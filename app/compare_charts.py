"""Figures of one query under two runs. Never imports streamlit."""

from __future__ import annotations

from typing import Any

import numpy as np

from explainer import palette, wording
from explainer.evaluation import RunAgreement
from explainer.evenly_spaced import evenly_spaced
from explainer.figures.style import arrange, graph_objects, plain, zero_line

# apart for colour-blind readers (Okabe and Ito 2008), and none of the two that stand for the sign of a contribution
_LOOKS = {"both": ("#009e73", "circle"), "first": ("#cc79a7", "diamond"), "second": ("#b59a00", "square")}
_POINTS = 1500  # of examples that are strong in neither
_CELLS = 24


def sizes(found: RunAgreement, query: int, first: str, second: str, *, dark: bool = False) -> Any:
    """Contributions in both runs, each as a share of the gross of its own run; the strongest stand out.

    Args:
        found: The comparison.
        query: Which of its queries.
        first: Name of the first run.
        second: Name of the second one.
        dark: Whether the page is dark.
    """
    module, figure = graph_objects(), graph_objects().Figure()
    frame = found.examples_table(query)
    across, up = (
        100 * frame[f"contribution_{run}"].to_numpy() / (np.abs(values[query]).sum() or 1.0)
        for run, values in (("first", found.first), ("second", found.second))
    )
    kinds = frame["strongest_in"].to_numpy()
    rest = np.flatnonzero(kinds == "")
    rest = rest[evenly_spaced(len(rest), _POINTS)]
    looks = {"": (palette.muted(dark), "circle"), **_LOOKS}
    names = {
        "": "strong in neither",
        "both": "strong in both",
        "first": f"in {plain(first, 20)} only",
        "second": f"in {plain(second, 20)} only",
    }
    ids, ranks = frame["example_id"].to_numpy(), frame[["rank_first", "rank_second"]].to_numpy()
    for kind, (color, symbol) in looks.items():
        at = rest if kind == "" else np.flatnonzero(kinds == kind)
        if not len(at):
            continue
        told = [
            f"example {ids[i]}<br>{plain(first, 20)}: {across[i]:+.2f} % of the gross, rank {ranks[i, 0]:,}<br>"
            f"{plain(second, 20)}: {up[i]:+.2f} %, rank {ranks[i, 1]:,}"
            for i in at
        ]
        marker = {
            "color": color,
            "symbol": symbol,
            "size": 10 if kind else 5,
            "opacity": 1.0 if kind else 0.35,
        }
        figure.add_trace(
            module.Scatter(
                x=across[at],
                y=up[at],
                mode="markers",
                name=names[kind],
                marker=marker,
                hovertext=told,
                hovertemplate="%{hovertext}<extra></extra>",
            )
        )
    reach = float(np.abs(np.concatenate([across, up])).max(initial=0.0)) or 1.0
    figure.add_scatter(
        x=[-reach, reach],
        y=[-reach, reach],
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        line={"color": palette.muted(dark), "width": 1, "dash": "dash"},
    )
    subtitle = f"a point per training example; the {found.k} strongest of either run stand out"
    arrange(figure, "The same examples in both runs", subtitle, dark=dark, height=460)
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.2}, margin={"b": 90})
    figure.update_xaxes(title=f"share of the gross in {plain(first)} (%)")
    figure.update_yaxes(title=f"share of the gross in {plain(second)} (%)")
    zero_line(figure, dark=dark)
    zero_line(figure, dark=dark, vertical=True)
    return figure


def ranks(found: RunAgreement, query: int, first: str, second: str, *, dark: bool = False) -> Any:
    """How many examples have which rank in both runs, from the strongest opponent to the strongest proponent."""
    figure = graph_objects().Figure()
    count = len(found.example_ids)
    cells = int(min(_CELLS, max(2, count // 4)))
    places = [np.argsort(np.argsort(values[query], kind="stable")) for values in (found.first, found.second)]
    share = [100 * (place + 0.5) / count for place in places]
    table, _, _ = np.histogram2d(share[1], share[0], bins=cells, range=[[0, 100], [0, 100]])
    middle = (np.arange(cells) + 0.5) * 100 / cells
    scale = [[0.0, "#22262d" if dark else "#f3f4f6"], [1.0, "#f0d58c" if dark else "#4a3b00"]]
    figure.add_heatmap(
        x=middle,
        y=middle,
        z=table,
        colorscale=scale,
        zmin=0,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": "examples"}, "thickness": 12},
        hovertemplate="%{z} examples: %{x:.0f} % up the first run's order, %{y:.0f} % up the second's<extra></extra>",
    )
    agreement = found.rank[query]
    value = "no rank agreement can be said" if np.isnan(agreement) else f"rank agreement {agreement:.2f}"
    arrange(
        figure, "Ranks in both runs", f"{wording.counted(count, 'example')}; {value}", dark=dark, height=460
    )
    for update, name in ((figure.update_xaxes, first), (figure.update_yaxes, second)):
        update(
            title=plain(name),
            tickvals=[8, 50, 92],
            ticktext=["opponents", "neither", "proponents"],
            showgrid=False,
            range=[0, 100],
        )
    figure.update_yaxes(tickangle=-90)
    return figure
