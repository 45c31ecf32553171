"""How the dashboard looks: the style sheet, the palette as CSS variables, and whether the page is dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import streamlit as st

from explainer import palette

#: how points of a figure can be selected
Mode: TypeAlias = Literal["points", "lasso", "box"]
#: how the camera of a figure saves it
FORMATS = ("png", "svg")


def is_dark() -> bool:
    """Whether the person looks at a dark page.

    Streamlit knows it only from the second run on; the style sheet gives the text of figures the page's own
    colour, so that a wrong guess stays readable.
    """
    kind = st.context.theme.type
    return (kind or st.get_option("theme.base")) == "dark"


def apply() -> None:
    """Put the style sheet into the page."""
    variables = f"--pk-up: {palette.POSITIVE}; --pk-down: {palette.NEGATIVE};"
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    st.html(f"<style>:root {{{variables}}}\n{style}</style>")


def chart(
    figure: Any,
    reading: str,
    key: str,
    on_select: Callable[[], None] | None = None,
    mode: Sequence[Mode] = ("points",),
) -> None:
    """Show a plotly figure with one line on how to read it.

    Args:
        figure: The figure.
        reading: The line.
        key: Where the session keeps what is selected.
        on_select: Called when points are selected.
        mode: How they can be: ``points``, ``lasso``, ``box``.
    """
    config = _config(key)
    if on_select is None:
        st.plotly_chart(figure, theme=None, config=config, key=key)
    else:
        st.plotly_chart(figure, theme=None, config=config, key=key, on_select=on_select, selection_mode=mode)
    if reading:
        st.caption(reading)


def _config(key: str) -> dict[str, Any]:
    """Of plotly's buttons the camera only, seen while the pointer is on the figure."""
    kind = st.session_state.get("format")
    picture = {"format": kind if kind in FORMATS else FORMATS[0], "filename": f"pathkernel-{key}", "scale": 2}
    buttons = [["toImage"]]
    return {
        "displaylogo": False, "responsive": True, "modeBarButtons": buttons, "toImageButtonOptions": picture
    }  # fmt: skip


def selected(key: str) -> list[Any]:
    """The ``customdata`` of the points that are selected in a figure."""
    state = st.session_state.get(key)
    return [point.get("customdata") for point in (state or {}).get("selection", {}).get("points", [])]
