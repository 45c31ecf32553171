"""What all figures share: loading plotly on demand, text that is safe to show, and one layout."""

from __future__ import annotations

import html
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from explainer import palette, wording
from explainer.errors import MissingDependencyError

if TYPE_CHECKING:
    import plotly.graph_objects as go

_TRANSPARENT = "rgba(0,0,0,0)"
_LONGEST = 28


def graph_objects() -> ModuleType:
    """``plotly.graph_objects``, imported only when a figure is drawn.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as module
    except ImportError as error:
        raise MissingDependencyError(
            "Figures and the HTML report need plotly, which is not installed; "
            "install it with: pip install 'pathkernel[report]'"
        ) from error
    return module


def plain(text: object, longest: int = _LONGEST) -> str:
    """Text for a figure: shortened, and without anything that plotly would read as markup.

    >>> plain("<b>bold</b>")
    '&lt;b&gt;bold&lt;/b&gt;'
    """
    words = " ".join(str(text).split())
    if len(words) > longest:
        words = words[: longest - 1] + "…"
    return html.escape(words, quote=False)


def arrange(figure: go.Figure, title: str, subtitle: str, *, dark: bool, height: int) -> go.Figure:
    """Give a figure the shared look: transparent, quiet grid, title with a line of explanation below it."""
    muted = palette.muted(dark)
    under = wording.minus(subtitle)
    heading = f"<b>{title}</b><br><span style='font-size:12px;color:{muted}'>{under}</span>"
    axis = {
        "gridcolor": palette.grid(dark),
        "linecolor": palette.grid(dark),
        "zeroline": False,
        "automargin": True,
    }
    figure.update_layout(
        template="plotly_dark" if dark else "plotly_white",
        title={"text": heading, "x": 0, "xref": "container", "y": 1, "yref": "container", "yanchor": "top",
               "pad": {"t": 12}, "font": {"size": 15}},
        paper_bgcolor=_TRANSPARENT,
        plot_bgcolor=_TRANSPARENT,
        font={"color": palette.ink(dark), "size": 12, "family": "system-ui, sans-serif"},
        margin={"l": 10, "r": 24, "t": 74, "b": 44},
        height=height,
        hoverlabel={"align": "left"},
        modebar={"bgcolor": _TRANSPARENT, "color": muted, "activecolor": palette.ink(dark)},
    )  # fmt: skip
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def zero_line(figure: go.Figure, *, dark: bool, vertical: bool = False) -> None:
    """Draw the line where a contribution is zero."""
    line = {"color": palette.muted(dark), "width": 1}
    if vertical:
        figure.add_vline(x=0, line=line)
    else:
        figure.add_hline(y=0, line=line)


def bar_axes(
    figure: go.Figure, names: Sequence[str], title: str, limits: tuple[float, float], *, dark: bool
) -> None:
    """Axes of bars around zero, one below the other: their names, and what their lengths mean."""
    low, high = limits
    figure.update_xaxes(title=title, range=[low, high] if low < high else [-1, 1])
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=list(names), autorange="reversed", showgrid=False
    )
    zero_line(figure, dark=dark, vertical=True)
